"""Reading and writing PEFT's adapter files."""
