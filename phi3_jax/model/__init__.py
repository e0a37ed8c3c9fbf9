"""The Phi-3 network. It knows nothing of LoRA or quantization."""
