"""Shards -> batches: store, dataset, decoding, mapper, loaders, registration."""
