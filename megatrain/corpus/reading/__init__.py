"""Reads documents: cuts the input into units of work, and gives the documents of a unit, whatever is broken in its files."""
