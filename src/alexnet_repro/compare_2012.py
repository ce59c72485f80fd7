"""Compare recipe=as_run with the layer files of the authors' own program.

python -m alexnet_repro.compare_2012 source=AlexNet-Source-Code layers=145
"""

from alexnet_repro.cli import command

if __name__ == "__main__":
    command("compare_2012")
