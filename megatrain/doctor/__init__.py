"""Would a job run here? Readings and measurements of each rank, and the rules that judge them (docs/scale.md)."""
