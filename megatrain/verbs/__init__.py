"""The verbs that are programs of their own: bench, eval, import and export, generate, plan, verify."""
