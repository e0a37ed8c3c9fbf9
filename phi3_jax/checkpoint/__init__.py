"""Hugging Face model folders: reading, writing, quantized and merged checkpoints."""
