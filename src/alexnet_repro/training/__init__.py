"""A run: the classifier, its optimizer and schedule, its folder, checkpoints and processes."""
