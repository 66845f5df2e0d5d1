"""Megatron-style training of large language models, readable in an afternoon."""

__version__ = "0.1.0"
