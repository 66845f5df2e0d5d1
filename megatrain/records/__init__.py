"""What is written for people: metrics and events, TensorBoard, plots, progress, where a run came from (docs/watching.md)."""
