"""Kneser-Ney n-gram models: from text to perplexity (docs/ngram.md)."""

from megatrain.ngram.reading import load

__all__ = ["load"]
