"""Predictions about a run before it is started: memory, and the timeline of a step's pipeline."""
