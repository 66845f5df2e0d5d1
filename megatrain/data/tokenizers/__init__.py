"""Kinds of tokenizer files, the engine that encodes fast, training, and what a vocabulary is worth."""
