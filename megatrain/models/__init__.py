"""The transformer block, what it is made of, and the model families."""
