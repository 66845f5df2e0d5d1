"""Keeps a run alive, and ends it: the watch for hangs (guard, blame), signals and limits that stop it, torchrun's agent."""
