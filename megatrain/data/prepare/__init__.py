"""Stages from text files to a token store."""
