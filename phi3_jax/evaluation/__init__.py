"""Loss, held-out metrics, generation metrics, lm-eval."""
