"""Near-duplicates between pretraining and evaluation images."""
