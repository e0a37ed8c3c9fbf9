"""The Phi-3 network, independent of LoRA and quantization."""
