"""Resuming a run: which checkpoint it goes on from, what has changed since that was saved, its state restored (docs/resuming.md)."""
