"""Models and adapters for other programs: model folders, PEFT adapters, and GGUF files."""
