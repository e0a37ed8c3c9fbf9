"""Decoding, sampling, and answers to prompts."""
