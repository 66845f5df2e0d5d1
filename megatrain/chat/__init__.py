"""Conversations as token ids for a model: chat templates, of Hugging Face directories and built in."""
