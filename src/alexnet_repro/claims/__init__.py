"""What the paper claims (paper.yaml), what was measured (results), and the verdicts that follow (verdict)."""
