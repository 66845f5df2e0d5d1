"""Records of a run for people: metrics and events, TensorBoard, plots, progress, where the run came from (docs/watching.md)."""
