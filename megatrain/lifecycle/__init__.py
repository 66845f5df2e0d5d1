"""What keeps a run alive and ends it: the guard, who is to blame, signals and limits, the launcher's agent."""
