"""The nets, their normalisation and the placement of towers: mathematics, which knows nothing of files and configs."""
