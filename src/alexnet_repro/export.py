"""Write a trained net for other programs.

python -m alexnet_repro.export run=runs/paper/seed-0 format=onnx
"""

from alexnet_repro.cli import command

if __name__ == "__main__":
    command("export")
