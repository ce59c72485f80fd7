"""Prepare images as a store, and load batches from the store."""
