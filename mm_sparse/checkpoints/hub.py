"""Folders of scorers on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mm_sparse.checkpoints.format import RECORD, WEIGHTS

CARD = """---
library_name: mm-sparse
tags: [sparse-attention, mm-sparse]
---
Scorers for sparse attention, written by `mm_sparse.save_scorers`.

```python
import mm_sparse as mms

mms.load_scorers(model, "{name}")
```
"""


def is_hub_name(name: str) -> bool:
    """Whether a name reads as one of a repository: "owner/name"."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def fetch_folder(name: str, revision: str | None = None) -> Path:
    """Fetch the files of scorers, or find them in the hub's cache.

    Args:
        name: "owner/name".
        revision: branch, tag or commit.
    Raises:
        ValueError: the hub has no such repository, or cannot be reached and nothing is cached.
    """
    hub = _hub("load")
    try:
        folder = hub.snapshot_download(
            name, revision=revision, allow_patterns=[WEIGHTS, RECORD, "card.json"]
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"folder must be a folder of save_scorers, shipped scorers or a repository of the hub, "
            f"got {name!r}: {error}"
        ) from error
    return Path(folder)


def push_folder(folder: Path, name: str, private: bool | None = None) -> None:
    """Upload the files of scorers, with a README that says how to load them if there is none.

    Args:
        name: "owner/name"; the repository is made if it does not exist.
        private: of a repository that is made; the owner's default if None.
    Raises:
        ValueError: the name is not one of a repository.
    """
    if not is_hub_name(name):
        raise ValueError(f'push must be a repository as "owner/name", got {name!r}')
    api = _hub("save").HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    files = [WEIGHTS, RECORD, "card.json", "README.md"]
    api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files)
    if not (folder / "README.md").exists() and not api.file_exists(name, "README.md"):
        text = CARD.format(name=name).encode()
        api.upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id=name)


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"to {what} scorers by the hub needs huggingface_hub; pip install huggingface_hub"
        ) from error
    return huggingface_hub
