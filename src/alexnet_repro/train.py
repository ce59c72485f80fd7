"""Train a net with one of the recipes, measure it, and compare it with the paper.

python -m alexnet_repro.train +ablation=no_lrn
"""

from alexnet_repro.cli import command

if __name__ == "__main__":
    command("train")
