"""Convert images into a store (Section 2).

python -m alexnet_repro.prepare data=imagenette source=imagenette.tar
"""

from alexnet_repro.cli import command

if __name__ == "__main__":
    command("prepare")
