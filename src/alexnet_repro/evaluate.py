"""Measure a trained net, or several whose predictions are averaged (Table 2), with one view or ten crops.

python -m alexnet_repro.evaluate run=runs/paper/seed-0 views=ten_crop
python -m alexnet_repro.evaluate runs=[runs/paper/seed-0,runs/paper/seed-1] views=ten_crop
"""

from alexnet_repro.cli import command

if __name__ == "__main__":
    command("evaluate")
