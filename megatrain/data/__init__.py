"""The data pipeline from text files to batches: uses numpy, not torch."""
