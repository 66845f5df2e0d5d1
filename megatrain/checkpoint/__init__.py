"""Saving and loading the state of a run: tensor files, manifest, and their directory."""
