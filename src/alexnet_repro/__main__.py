"""List the commands.

python -m alexnet_repro
"""

import ast
from pathlib import Path

from alexnet_repro.cli import MODULES


def described(command: str) -> str:
    """Return the first line of a command's docstring."""
    source = (Path(__file__).parent / f"{command}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


if __name__ == "__main__":
    for command in MODULES:
        print(f"python -m alexnet_repro.{command:<13} {described(command)}")
    print("\nEach explains its options with --help. Start with: python -m alexnet_repro.train")
