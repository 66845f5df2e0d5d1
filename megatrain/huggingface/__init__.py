"""Hugging Face directories: config.json and weights, read and written (docs/huggingface.md)."""
