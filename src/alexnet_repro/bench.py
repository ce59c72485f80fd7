"""Measure speed against plain baselines.

python -m alexnet_repro.bench [only=step|loader|eval|placement|memory|prepare] [out=FILE.json]
"""

from alexnet_repro.cli import command

if __name__ == "__main__":
    command("bench")
