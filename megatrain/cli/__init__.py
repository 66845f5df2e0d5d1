"""The command line: a module for each group of verbs, with their arguments, help and exit codes."""
