"""From text files to batches: numpy only, no torch."""
