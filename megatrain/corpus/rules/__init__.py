"""Rules over documents: signals of quality and repetition, thresholds with their sources, and the language of a text."""
