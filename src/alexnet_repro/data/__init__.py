"""Images -> store -> batches."""
