"""PEFT's adapter files, in and out."""
