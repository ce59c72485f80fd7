"""Test that modules import only from lower layers, and that importing the package is fast."""

import ast
import subprocess
import sys
from pathlib import Path

import alexnet_repro

ROOT = Path(alexnet_repro.__file__).parent
# Layers from the top down. A component may import from itself and from lower layers, but not from other components of
# its own layer.
LAYERS = [
    {"__main__"},
    {"train", "evaluate", "prepare", "report", "bench", "features", "export", "convert", "compare_2012"},
    {"page", "benchmarks", "original"},
    {"sharing"},
    {"training"},
    {"claims"},
    {"data"},
    {"cli"},
    {"composition", "command_line"},
    {"option_errors", "error_messages"},
    {"command_options"},
    {"configs", "options", "files", "provenance", "sweep"},
    {"net"},  # mathematics, which knows nothing of the rest
    {"processes"},
    {"errors"},
]
LAYER_OF = {component: number for number, layer in enumerate(LAYERS) for component in layer}
MAY_IMPORT = {  # components that import less than the layers below them
    "net": {"net", "errors"},
    "data": {"data", "errors", "files", "processes", "provenance"},
    "claims": {"claims", "data", "net", "errors", "configs", "files", "provenance"},
    "configs": set(),
    "errors": set(),
    "error_messages": {"configs"},
    "files": {"errors"},
    "processes": {"errors"},
    "provenance": {"errors"},
    "sweep": {"errors"},
}
HYDRA = {"cli", "composition", "command_line", "sweep"}


def imports(path: Path) -> set[str]:
    """Return all modules that a file imports, at the top level or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_component_belongs_to_a_layer() -> None:
    components = {
        path.stem if path.is_file() else path.name for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()
    }
    assert components - {"__init__", "__pycache__", "conf"} == set(LAYER_OF)
    for folder in (path for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert len([f for f in folder.glob("*.py") if f.name != "__init__.py"]) >= 3, (
            f"{folder} is a folder of one or two files"
        )


def test_imports_run_downwards() -> None:
    seen = 0
    for path in ROOT.rglob("*.py"):
        component = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if component == "__init__":
            continue
        for module in imports(path):
            parts = module.split(".")
            if parts[0] == "hydra":
                assert component in HYDRA, f"{path} imports Hydra"
            if parts[0] != "alexnet_repro":
                continue
            seen += 1
            other = parts[1]
            assert other in LAYER_OF, f"{path} imports {module}"
            allowed = LAYER_OF[other] > LAYER_OF[component] or other == component
            assert allowed, f"{path} imports {module}, which is not below it"
            assert other in MAY_IMPORT.get(component, {other}), f"{path} imports {module}"
    assert seen > 100


def test_public_names_are_imported_lazily() -> None:
    script = """
import sys, time
start = time.perf_counter()
import alexnet_repro
seconds = time.perf_counter() - start
assert not any(name.partition(".")[0] in ("torch", "hydra", "lightning", "numpy") for name in sys.modules)
assert seconds < 0.1, seconds
from alexnet_repro import AlexNet, LocalResponseNorm, PaperSGD, ten_crop, Classifier, Store
assert AlexNet.__name__ == "AlexNet" and set(alexnet_repro.__all__) <= {*dir(alexnet_repro), *alexnet_repro._MODULES}
try:
    alexnet_repro.nothing
except AttributeError:
    print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
