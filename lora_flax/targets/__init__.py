"""Which layers a `LoraConfig` selects, by PEFT's rules."""
