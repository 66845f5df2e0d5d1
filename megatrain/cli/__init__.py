"""The command line: one module a group of verbs, with their arguments, help and exit codes."""
