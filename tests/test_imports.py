"""Packages import those before them only, as packages; files import each other in no circle."""

import ast
import importlib.util
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from mm_sparse._exports import public_names

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "mm_sparse": ROOT / "mm_sparse",
    "mm_sparse.kernels": ROOT / "kernels",
    "mm_sparse.encoders": ROOT / "encoders",
    "mm_sparse.recipes": ROOT / "recipes",
}
# Each line may import from the lines above it, and from itself.
ORDER = [
    ["_extras"],
    ["_exports"],
    ["kernels.sizes", "kernels.device", "kernels.block_lists", "kernels.cached_launch"],
    ["kernels.cpu", "kernels.reference", "kernels.triton", "kernels.hopper", "kernels.paged"],
    ["kernels.dispatch"],
    ["kernels.ops", "kernels.paged_attention"],
    ["config", "modality"],
    ["layout"],
    ["_backend", "_checks", "cuda_graph"],
    ["selection"],
    ["scorers"],
    ["attention"],
    ["integrations"],
    ["distillation"],
    ["checkpoints"],
    ["integrations.vllm"],
    ["analysis"],
    ["bench"],
    ["cli"],
    ["encoders"],
    ["recipes"],
    ["recipes.pretrained"],
    ["recipes.data"],
    ["recipes.datasets"],
    ["recipes.metrics"],
    ["recipes.training"],
    ["recipes.models"],
    ["recipes.finetuning"],
    ["recipes.run"],
    ["recipes.distillation"],
    ["recipes.evaluation"],
]
RANK = {f"mm_sparse.{name}": rank for rank, line in enumerate(ORDER) for name in line}
MOST_MODULES = 15
# What breaks a rule today, as (file, imported name). Take out what is mended; put nothing in.
ALLOWED_ORDER: set[tuple[str, str]] = set()
ALLOWED_DEEP = {
    ("mm_sparse/cli/bench.py", "mm_sparse.bench.results"),
    ("recipes/evaluation/vlm_quality.py", "mm_sparse.recipes.metrics.ranking_methods"),
    ("recipes/models/language.py", "mm_sparse.recipes.pretrained.wheels"),
    ("recipes/models/vision.py", "mm_sparse.recipes.pretrained.wheels"),
}
ALLOWED_LOST: set[tuple[str, str]] = set()


class Import(NamedTuple):
    line: int
    module: str
    """As it is written, relative ones made absolute."""
    name: str | None
    """What is taken of the module; None where the module itself is imported."""
    runs: bool
    """False under `if TYPE_CHECKING`."""


def module_of(path: Path) -> str:
    """Import name of a file of ours."""
    for name, folder in reversed(FOLDERS.items()):
        if path.is_relative_to(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            return ".".join([name, *(p for p in parts if p != "__init__")])
    raise ValueError(path)


FILES = {
    module_of(path): path for folder in FOLDERS.values() for path in sorted(folder.rglob("*.py"))
}
STUBS = {
    module_of(path): public_names(path)
    for folder in FOLDERS.values()
    for path in folder.rglob("__init__.pyi")
}
PACKAGES = {module for module, path in FILES.items() if path.name == "__init__.py"} | {*FOLDERS}


def imports(module: str, source: str | None = None) -> Iterator[Import]:
    """Everything that a file imports from this package, inside of functions too."""
    tree = ast.parse(FILES[module].read_text() if source is None else source)
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = module.split(".") if module in PACKAGES else module.split(".")[:-1]
    root_names = set()
    for node in ast.walk(tree):
        runs = id(node) not in typed
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, None, runs)
                if alias.name == "mm_sparse":
                    root_names.add(alias.asname or alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield Import(node.lineno, ".".join(base), alias.name, runs)
    for node in ast.walk(tree):
        # mms.Name is an import of that name.
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id in root_names and node.attr in STUBS["mm_sparse"]:
            yield Import(node.lineno, "mm_sparse", node.attr, id(node) not in typed)


def home(module: str, name: str | None) -> str | None:
    """The module in which a name is written, None where that is not ours."""
    if module.partition(".")[0] != "mm_sparse":
        return None
    if name is None:
        return module
    if f"{module}.{name}" in {*FILES, *PACKAGES}:
        return f"{module}.{name}"
    if name in STUBS.get(module, {}):
        return home(f"{module}.{STUBS[module][name]}", name)
    return module


def package_of(module: str) -> str | None:
    """The entry of `ORDER` that a module belongs to; None of `mm_sparse` itself."""
    parts = module.split(".")
    names = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((name for name in names if name in RANK), None)


def where(module: str) -> str:
    return str(FILES[module].relative_to(ROOT))


def test_every_module_has_a_place_in_the_order():
    assert [where(m) for m in FILES if package_of(m) is None and m != "mm_sparse"] == []


def upward() -> dict[tuple[str, str], int]:
    """Imports of a package behind the file's own."""
    found = {}
    for module in FILES:
        own = package_of(module)
        for item in imports(module):
            target = home(item.module, item.name)
            other = None if target is None else package_of(target)
            if own is not None and other is not None and RANK[other] > RANK[own]:
                found[where(module), str(target)] = item.line
    return found


def deep() -> dict[tuple[str, str], int]:
    """Imports of a module inside of another package, kernels aside."""
    found = {}
    for module in FILES:
        own = package_of(module)
        for item in imports(module):
            target = f"{item.module}.{item.name}"
            target = target if item.name and target in FILES else item.module
            other = package_of(target)
            if other in (None, own, target) or target in STUBS:
                continue
            if not target.startswith("mm_sparse.kernels"):
                found[where(module), target] = item.line
    return found


def lost() -> dict[tuple[str, str], int]:
    """Imports of names that a package does not export."""
    found = {}
    for module in FILES:
        for item in imports(module):
            if item.module not in STUBS or item.name in (None, "__version__"):
                continue
            if home(item.module, item.name) == item.module:
                found[where(module), f"{item.module}.{item.name}"] = item.line
    return found


def test_imports_go_down_only():
    assert {at: line for at, line in upward().items() if at not in ALLOWED_ORDER} == {}


def test_other_packages_are_imported_as_packages():
    assert {at: line for at, line in deep().items() if at not in ALLOWED_DEEP} == {}


def test_names_taken_from_packages_are_in_their_stubs():
    assert {at: line for at, line in lost().items() if at not in ALLOWED_LOST} == {}


def test_nothing_is_allowed_that_was_mended():
    mended = ALLOWED_ORDER - {*upward()} | ALLOWED_DEEP - {*deep()} | ALLOWED_LOST - {*lost()}
    assert not mended, "take these out of the ALLOWED sets of this file"


def test_files_are_imported_by_their_package_name():
    for module in FILES:
        for item in imports(module):
            assert item.module.partition(".")[0] not in {"kernels", "encoders", "recipes"}, (
                f"{where(module)}:{item.line} imports {item.module}: "
                f"its import name is mm_sparse.{item.module}"
            )


def test_stubs_name_what_exists():
    for package, names in STUBS.items():
        for name in names:
            target = home(package, name)
            assert target in FILES, f"{package}.{name} comes from {target}"
            tree = ast.parse(FILES[target].read_text())
            bound = {n.name for n in tree.body if hasattr(n, "name")}
            for node in tree.body:
                if isinstance(node, ast.ImportFrom):
                    bound |= {alias.asname or alias.name for alias in node.names}
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                bound |= {t.id for t in targets if isinstance(t, ast.Name)}
            assert name in bound or target == f"{package}.{name}", f"{name} is not in {target}"


def test_files_import_each_other_in_no_circle():
    graph = {module: set() for module in FILES}
    for module in FILES:
        for item in imports(module):
            target = home(item.module, item.name)
            if item.runs and target in FILES and target != module:
                graph[module].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "folder",
    sorted({path.parent for path in FILES.values()}),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_folders_are_small(folder):
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES


@pytest.mark.parametrize("folder", sorted({p for m, p in FOLDERS.items() if m != "mm_sparse"}))
def test_folders_beside_the_package_are_packages_of_it(folder):
    assert importlib.util.find_spec(f"mm_sparse.{folder.name}") is not None


def test_kernels_has_no_init_file():
    """transformers looks for a package that is called `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["mm_sparse", "tests", "docs", "examples"])
def test_nothing_else_of_a_clone_is_a_module_of_the_package(name):
    """`mm_sparse.mm_sparse.layout` would make every class twice."""
    assert importlib.util.find_spec(f"mm_sparse.{name}") is None


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("from mm_sparse.layout import Plan", "mm_sparse.layout.plan"),
        ("from .layout import Plan", "mm_sparse.layout.plan"),
        ("from mm_sparse import Plan", "mm_sparse.layout.plan"),
        ("import mm_sparse as mms\nmms.Plan", "mm_sparse.layout.plan"),
        ("def f():\n    from mm_sparse.kernels import ops", "mm_sparse.kernels.ops"),
        ("import mm_sparse.config", "mm_sparse.config"),
        ("from torch import nn", None),
    ],
)
def test_what_an_import_means(source, target):
    found = [home(item.module, item.name) for item in imports("mm_sparse.config", source)]
    assert found[-1] == target


def test_imports_for_types_are_told_apart():
    source = "if TYPE_CHECKING:\n    from mm_sparse.layout import Plan\nimport mm_sparse.layout"
    found = {item.line: item.runs for item in imports("mm_sparse.config", source)}
    assert found == {2: False, 3: True}
