"""A trained model at work: its weights again under any layout, decoding, blanks filled, a plain module."""
