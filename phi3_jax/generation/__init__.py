"""Decoding, sampling and answering prompts."""
