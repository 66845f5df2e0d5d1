"""Training samples of each objective: next tokens, blanks, prompts with answers."""
