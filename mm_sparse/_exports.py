"""Public names of a package, from the stub beside its `__init__.py`, imported when asked for.

The stub `__init__.pyi` is the only list of a package's public names: analysers read it as it is,
and this module reads it when the package is imported. Nothing else of the package loads until a
name is used, so importing one name does not import the libraries that another one needs.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from mm_sparse._extras import extra_of


def public_names(stub: Path) -> dict[str, str]:
    """Module that each public name comes from, by the `from .module import` lines of a stub."""
    home: dict[str, str] = {}
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            home.update((alias.asname or alias.name, node.module) for alias in node.names)
    return home


def lazy_exports(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose `__init__.py` is `file`."""
    home = public_names(Path(file).with_suffix(".pyi"))

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(f".{home[name]}", package), name)
        except ModuleNotFoundError as error:
            extra = extra_of(error)
            if not extra:
                raise
            raise ModuleNotFoundError(f"{error}{extra}", name=error.name) from error
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, names, sorted(home)
