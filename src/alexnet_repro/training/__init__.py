"""Training: the classifier, its optimizer and schedule, the run folder, checkpoints and processes."""
