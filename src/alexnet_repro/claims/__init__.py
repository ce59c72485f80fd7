"""The paper's claims (paper.yaml), measured results (results.py) and verdicts (verdict.py)."""
