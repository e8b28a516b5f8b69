"""Scorers from and to repositories of a hub; the hub is a folder."""

from pathlib import Path
from typing import Any

import pytest

import mm_sparse as mms
from mm_sparse.checkpoints.format import RECORD, WEIGHTS
from tests.support.hf_models import SPARSE, build

pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")


class LocalHub:
    """Stands for the hub: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.fetched, self.made = root, [], []

    def snapshot_download(self, name: str, *, revision: str | None, allow_patterns: Any) -> str:
        self.fetched.append((name, revision))
        if not (self.root / name).is_dir():
            raise OSError("404 not found")
        return str(self.root / name)

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> None:
        self.made.append((name, private, exist_ok))
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
        for file in folder_path.iterdir():
            if file.name in allow_patterns:
                (self.root / repo_id / file.name).write_bytes(file.read_bytes())

    def file_exists(self, name: str, file: str) -> bool:
        return (self.root / name / file).exists()

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> None:
        (self.root / repo_id / path_in_repo).write_bytes(path_or_fileobj)


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    made = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(hub, "HfApi", lambda: made)
    return made


def test_what_is_pushed_is_loaded_by_name(local: LocalHub, tmp_path: Path) -> None:
    model = mms.sparsify(build("llama").model, SPARSE, scorer="fine")
    mms.save_scorers(model, tmp_path / "own", push="me/scorers", private=True)
    assert local.made == [("me/scorers", True, True)]
    files = {file.name for file in (local.root / "me/scorers").iterdir()}
    assert files == {WEIGHTS, RECORD, "README.md"}
    assert 'load_scorers(model, "me/scorers")' in (local.root / "me/scorers/README.md").read_text()
    other = mms.load_scorers(build("llama").model, "me/scorers", revision="v1")
    assert local.fetched == [("me/scorers", "v1")]
    assert mms.sparse_config(other) == SPARSE
    for name, scorer in mms.scorers_of(model).items():
        for key, value in scorer.state_dict().items():
            assert value.equal(mms.scorers_of(other)[name].state_dict()[key])


def test_what_the_hub_does_not_have_is_said(local: LocalHub) -> None:
    with pytest.raises(ValueError, match=r"folder must be .* got 'me/nothing': 404 not found"):
        mms.load_scorers(build("llama").model, "me/nothing")
    with pytest.raises(ValueError, match=r"folder must be one of .* got 'nothing'"):
        mms.load_scorers(build("llama").model, "nothing")
    assert local.fetched == [("me/nothing", None)]


def test_a_wrong_name_writes_nothing(local: LocalHub, tmp_path: Path) -> None:
    model = mms.sparsify(build("llama").model, SPARSE, scorer="fine")
    with pytest.raises(ValueError, match='push must be a repository as "owner/name", got'):
        mms.save_scorers(model, tmp_path / "own", push="name")
    assert not (tmp_path / "own").exists()
    assert not local.made


def budgets(ratio: float) -> mms.SparseConfig:
    ratios = {
        "model.layers.0.self_attn": (0.1, 0.5),
        "model.layers.1.self_attn": {"TEXT": (0.2, 0.4), "IMAGE": 0.1},
    }
    stored = mms.SparseConfig(ratio=0.3, dense_below=0, layer_ratio=ratios)
    return stored if ratio == 0.3 else stored.scaled(ratio)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = mms.sparsify(build("llama").model, budgets(0.3), scorer="fine")
    mms.save_scorers(model, tmp_path / "budgets")
    return tmp_path / "budgets"


@pytest.mark.parametrize("sparse", [False, True])
def test_ratio_scales_the_stored_budgets(folder: Path, sparse: bool) -> None:
    model = build("llama").model
    if sparse:
        mms.sparsify(model, mms.SparseConfig(ratio=0.5, dense_below=0))
    mms.load_scorers(model, folder, ratio=0.15)
    assert mms.sparse_config(model).layer_ratio == budgets(0.15).layer_ratio
    assert mms.sparse_config(model).ratio == 0.15


def test_budgets_of_the_model_give_way_and_that_is_said(folder: Path) -> None:
    own = mms.SparseConfig(ratio=0.3, dense_below=0, layer_ratio={"model.layers.0.self_attn": 0.9})
    model = mms.sparsify(build("llama").model, own)
    with pytest.warns(UserWarning, match="give way to the budgets that were stored"):
        mms.load_scorers(model, folder)
    assert mms.sparse_config(model).layer_ratio == budgets(0.3).layer_ratio
    model = mms.sparsify(build("llama").model, own)
    mms.load_scorers(model, folder, budgets=False)
    assert mms.sparse_config(model).layer_ratio == own.layer_ratio
