"""Pages name what exists, and the program of the page on models of one's own runs."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mm_sparse.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
PROGRAM = PAGES["docs/tutorials/your-model.md"]
# What pages name and a part of the package does not have yet, as (page, name). Only shrinks.


def lines():
    found = re.findall(r"```diff\n(.*?)```", PROGRAM, re.S)
    assert len(found) == 1
    return found[0].splitlines()


def missing(pattern, exists) -> set[tuple[str, str]]:
    """(page, name) of all that pages name by a pattern and that does not exist."""
    found = {(page, name) for page, text in PAGES.items() for name in re.findall(pattern, text)}
    assert found
    return {(page, name) for page, name in found if not exists(page, name)}


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or what a module holds."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            if importlib.util.find_spec(".".join(parts[:size])) is None:
                continue
        except ModuleNotFoundError:
            continue
        if size == len(parts):
            return True
        value = importlib.import_module(".".join(parts[:size]))
        for attribute in parts[size:]:
            if not hasattr(value, attribute):
                return False
            value = getattr(value, attribute)
        return True
    return False


def test_fewer_than_50_lines_change():
    assert 0 < sum(line[:1] in "+-" and line != "" for line in lines()) < 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dropped", "sparse"), [("+", False), ("-", True)], ids=["before", "after"]
)
def test_the_program_runs(tmp_path, dropped, sparse):
    script = "\n".join(line[1:] for line in lines() if not line.startswith(dropped))
    (tmp_path / "program.py").write_text(script)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss") == 4
    assert (done.stdout.count("  sparse  ") == 4) == sparse
    assert (tmp_path / "scorers").is_dir() == sparse


def test_modules_that_are_run_exist():
    def runs(page: str, module: str) -> bool:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            return False
        if spec is None or not module.startswith("mm_sparse."):
            return spec is not None
        return spec.origin is not None and "__main__" in Path(spec.origin).read_text()

    assert missing(r"python -m ([\w.]+)", runs) == set()


RECIPE_VERBS = ("ls", "cp", "run", "export", "join")


def test_commands_exist():
    # In code: `mm-sparse NAME ...`, or a line of a block that starts with it.
    found = missing(r"(?:`|^|\$ )mm-sparse (\w+)", lambda page, name: name in COMMANDS)
    found |= missing(r"(?m)^mm-sparse (\w+)", lambda page, name: name in COMMANDS)
    found |= missing(r"mm-sparse recipes (\w+)", lambda page, name: name in RECIPE_VERBS)
    assert {(page, name) for page, name in found if name != "COMMAND"} == set()


def test_dotted_names_resolve():
    found = missing(r"(?<![\w./-])mm_sparse(?:\.[A-Za-z_]\w*)+", lambda page, name: resolves(name))
    assert found == set()


def test_names_of_the_package_exist():
    import mm_sparse as mms

    assert missing(r"\bmms\.([A-Za-z_]\w*)", lambda page, name: hasattr(mms, name)) == set()


def test_links_lead_to_files():
    def leads(page: str, target: str) -> bool:
        return ((ROOT / page).parent / target).exists()

    pattern = r"\]\((?!https?:|mailto:|#)([^)#\s]+)"
    assert missing(pattern, leads) == set()
    assert {
        (page, target)
        for page, text in PAGES.items()
        for target in re.findall(r"""(?:src|href)=["'](?!https?:|#)([^"'#]+)""", text)
        if not leads(page, target)
    } == set()


def test_paths_exist():
    """Of files and folders of a clone, as commands and sentences name them."""
    folders = "mm_sparse|kernels|encoders|recipes|docs|tests|examples"
    pattern = rf"(?<![\w./:~-])((?:{folders})/[\w./-]*\w/?)(?![\w*{{<]|/\*)"
    # NAME and the like stand for what a reader writes.
    assert missing(pattern, lambda _, path: "NAME" in path or (ROOT / path).exists()) == set()
