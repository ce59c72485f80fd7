"""Measure a trained net, or an ensemble of nets (Table 2), on one view or ten crops.

python -m alexnet_repro.evaluate run=runs/paper/seed-0 views=ten_crop
python -m alexnet_repro.evaluate runs=[runs/paper/seed-0,runs/paper/seed-1] views=ten_crop
"""

from alexnet_repro.cli import command

if __name__ == "__main__":
    command("evaluate")
