"""What the paper claims (paper.yaml), what was measured (results), and what follows from both (verdict)."""
