"""Hugging Face model folders: reading and writing them, quantized and merged checkpoints."""
