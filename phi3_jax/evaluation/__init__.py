"""Loss, held-out metrics, generation metrics and lm-eval."""
