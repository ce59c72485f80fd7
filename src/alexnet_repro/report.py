"""Make one page that compares the paper's claims with the measurements and shows the figures.

python -m alexnet_repro.report [runs=[runs/paper/seed-0]] [logger=wandb]
"""

from alexnet_repro.cli import command

if __name__ == "__main__":
    command("report")
