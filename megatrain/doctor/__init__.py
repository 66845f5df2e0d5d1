"""Would a job run here? What each rank sees and measures, and the rules that judge it (docs/scale.md)."""
