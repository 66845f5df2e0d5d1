"""Public helpers for tests: simulated ranks, real processes, and agreement between runs."""
