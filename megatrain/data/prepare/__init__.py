"""Stages from text files to a token store: read, tokenize; and a corpus made of the standard library."""
