"""Going on: what a run began from, what has changed since it was saved, its state restored (docs/resuming.md)."""
