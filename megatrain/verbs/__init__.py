"""What the verbs do that are programs of their own: bench, eval, export and import, generate, plan, verify."""
