"""Learned block-sparse attention for transformers that read text, images, audio and video."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from mm_sparse._exports import lazy_exports

__version__ = "0.2.0"

# `__init__.pyi` is the list of public names; importing the package imports neither torch nor them.
__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)


def _map_folders(root: Path) -> None:
    """Make the folders that stand beside this one in a clone packages of this one.

    An installed package holds them inside. No entry is added to `__path__`: everything else in the
    clone stays out of reach, so that no module can be imported under two names.
    """
    if not (root / "pyproject.toml").is_file():
        return
    for name in ("kernels", "encoders", "recipes"):
        folder, full = root / name, f"{__name__}.{name}"
        if not folder.is_dir() or full in sys.modules:
            continue
        # kernels/ has no __init__.py: transformers looks for a package that is called `kernels`.
        init = folder / "__init__.py"
        spec = spec_from_file_location(full, init, submodule_search_locations=[str(folder)])
        if spec is None:
            raise ImportError(f"{folder} must be a folder of Python modules")
        module = sys.modules[full] = module_from_spec(spec)
        globals()[name] = module
        if init.is_file() and spec.loader is not None:
            spec.loader.exec_module(module)


_map_folders(Path(__file__).resolve().parent.parent)
