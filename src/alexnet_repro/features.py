"""Write the outputs of a trained net's layers for a folder of images to a file.

python -m alexnet_repro.features run=runs/paper/seed-0 source=FOLDER layers=[conv5,fc7] out=features.npz
"""

from alexnet_repro.cli import command

if __name__ == "__main__":
    command("features")
