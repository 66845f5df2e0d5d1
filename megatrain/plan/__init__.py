"""What a run will do, before it is started."""
