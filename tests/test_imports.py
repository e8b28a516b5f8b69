"""Imports go one way: recipes -> encoders -> mm_sparse -> kernels."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["kernels", "mm_sparse", "encoders", "recipes"]
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def floor_of(module: str) -> str | None:
    """The folder that holds `module`, or None where the module is not ours."""
    parts = module.split(".")
    if parts[0] != "mm_sparse":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "mm_sparse"


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module that a file imports, inside functions too."""
    relative = path.relative_to(ROOT).with_suffix("")
    package = list(relative.parts[:-1])
    if package[0] != "mm_sparse":
        package = ["mm_sparse", *package]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = FLOORS.index(path.relative_to(ROOT).parts[0])
    for line, module in imported(path):
        top = module.split(".")[0]
        assert top not in {"kernels", "encoders", "recipes"}, (
            f"{path}:{line} imports {module}: its import name is mm_sparse.{module}"
        )
        floor = floor_of(module)
        assert floor is None or FLOORS.index(floor) <= own, f"{path}:{line} imports {module}"


def test_kernels_has_no_init_file():
    # transformers looks for a package that is called `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "floor"),
    [
        ("mm_sparse.kernels.ops", "kernels"),
        ("mm_sparse.recipes", "recipes"),
        ("mm_sparse.layout.token_layout.TokenLayout", "mm_sparse"),
        ("mm_sparse", "mm_sparse"),
        ("torch.nn", None),
    ],
)
def test_floor_of_a_module(module, floor):
    assert floor_of(module) == floor
