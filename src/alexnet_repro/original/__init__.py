"""Comparison with the layer files of the authors' own program."""
