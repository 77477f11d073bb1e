"""The order of the rooms: a package imports only from packages above it."""

import ast
from pathlib import Path

import cpt_jax

ORDER = [
    "core",
    "sharding",
    "models",
    "vocab",
    "data",
    "adapt",
    "optim",
    "checkpoint",
    "evaluate",
    "laws",
    "training",
    "report",
    "recipe",
    "sweep",
    "plan",
    "cli",
]
ROOT = Path(cpt_jax.__file__).parent


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name for name in names if name.startswith("cpt_jax.")}


def test_a_package_imports_only_from_those_above_it():
    wrong = []
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own.startswith("__"):
            continue
        for name in imports(path):
            other = name.split(".")[1]
            if ORDER.index(other) > ORDER.index(own):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_every_package_has_its_place_in_the_order():
    found = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert found <= set(ORDER)


def test_torch_is_never_imported():
    for path in ROOT.rglob("*.py"):
        assert "import torch" not in path.read_text(), path
