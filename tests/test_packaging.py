"""The packaging trap: no top-level module called `kernels` may come from this package."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["mm_sparse", "kernels", "encoders", "recipes"]


def python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that is built from a copy, so that no stale build folder leaks in."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_has_one_top_level_name(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"mm_sparse"}


def test_wheel_holds_every_module_and_config(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for part in PARTS:
        home = "mm_sparse" if part == "mm_sparse" else f"mm_sparse/{part}"
        for path in (ROOT / part).rglob("*"):
            if path.suffix in (".py", ".pyi", ".yaml"):
                assert f"{home}/{path.relative_to(ROOT / part)}" in inside
    trained = list((ROOT / "mm_sparse" / "checkpoints" / "weights").glob("*/*"))
    assert trained
    assert {str(path.relative_to(ROOT)) for path in trained} <= inside


def test_unpacked_wheel_imports_its_folders_away_from_the_clone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mm_sparse, mm_sparse.kernels;"
        "print(mm_sparse.__file__, *mm_sparse.kernels.__path__)"
    )
    for place in python(code, cwd=tmp_path).split():
        assert place.startswith(str(tmp_path))


def test_no_kernels_module_of_ours_beside_transformers():
    code = (
        "import sys, importlib.util, mm_sparse, mm_sparse.kernels, transformers\n"
        "from transformers import LlamaModel\n"
        "found = sys.modules.get('kernels')\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(getattr(found, '__file__', None), spec.origin if spec else None, sep='|')"
    )
    for place in python(code).split("|"):
        assert place == "None" or not Path(place).is_relative_to(ROOT)


def test_import_is_light():
    heavy = ["torch", "transformers", "timm", "open_clip", "torchaudio", "lightning", "matplotlib"]
    code = f"import sys, mm_sparse; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"


def test_public_names_resolve_whatever_was_imported_first():
    code = (
        "import importlib, types, mm_sparse as mms\n"
        "import pkgutil\n"
        "for m in pkgutil.walk_packages(mms.__path__, 'mm_sparse.'):\n"
        "    try:\n"
        "        importlib.import_module(m.name)\n"
        "    except ModuleNotFoundError as error:\n"
        # What the engine imports alone, where the engine is not.
        "        if not (error.name == 'vllm' and '.vllm.' in m.name):\n"
        "            raise\n"
        "print([n for n in mms.__all__\n"
        "       if isinstance(getattr(mms, n), types.ModuleType)])"
    )
    assert python(code) == "[]"


def test_unknown_public_name_is_refused():
    code = "import mm_sparse\ntry: mm_sparse.nothing\nexcept AttributeError as e: print(e)"
    assert python(code) == "module 'mm_sparse' has no attribute 'nothing'"


def test_packages_that_are_listed_are_those_on_disk():
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {
        path.parent.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("*.py")
    }
    names = {
        ".".join(p.parts if p.parts[0] == "mm_sparse" else ("mm_sparse", *p.parts)) for p in found
    }
    assert listed == names


@pytest.mark.parametrize("name", ["mm_sparse.mm_sparse", "mm_sparse.tests", "mm_sparse.docs"])
def test_nothing_else_of_the_clone_is_importable(name):
    code = f"import importlib.util, mm_sparse; print(importlib.util.find_spec({name!r}))"
    assert python(code) == "None"
