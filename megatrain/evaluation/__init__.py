"""Tasks: what a model can do, measured with metrics, intervals, and comparisons of two models."""
