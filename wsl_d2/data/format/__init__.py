"""What lies on disk: tars, indexes, labels, the manifest."""
