"""Nets that others can use: features, weights out and weights in."""
