"""The source of the functions of the user's own that settings name as `module:function`: it decides the weights as the settings do, so a
run's identity holds its hash. Nothing is imported: the driver knows no torch, which such a module most likely imports.

A module counts by its file, a package by all its Python files. What it imports in turn does not count.
"""

import hashlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path

OWN = ("model.name", "optim.loss", "data.augment")
"""The settings that may name such a function."""


def source_sha256(name: str) -> str:
    """SHA-256 of the source of `name` (`module:function`); "" for a module that cannot be found."""
    files = _files(name.partition(":")[0])
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()


def _files(module: str) -> list[Path]:
    places: list[str] | None = list(sys.path)
    spec = None
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return []
    for depth in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: depth + 1]), places)
        if spec is None:
            return []
        places = list(spec.submodule_search_locations or ())
    assert spec is not None
    if spec.submodule_search_locations:
        return sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.py"))
    return [Path(spec.origin)] if spec.origin else []
