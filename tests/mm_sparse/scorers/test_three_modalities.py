"""Scorers that were stored when video counted as IMAGE: they load, and rank video as images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mm_sparse as mms
from mm_sparse import FineScorer, Modality, RelevanceScorer, Scorer, TokenLayout
from mm_sparse.checkpoints.format import RECORD, WEIGHTS, read_scorers
from mm_sparse.checkpoints.pretrained import CHECKPOINTS
from tests.support.hf_models import SPARSE, build, long_ids
from tests.support.layouts import random_qk, small_config

OLD = (Modality.TEXT, Modality.IMAGE, Modality.AUDIO)
SIZES: dict[str, int] = {"num_query_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MAKERS: dict[str, Any] = {
    "relevance": lambda **_: RelevanceScorer(**SIZES, rank=4),
    "fine": lambda **args: FineScorer(**SIZES, **args),
    "blind": lambda **_: FineScorer(**SIZES, modalities=None, pairs=False),
    "pairs": lambda **_: FineScorer(**SIZES, modalities=None),
    "maps": lambda **args: FineScorer(**SIZES, pairs=False, **args),
}


def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they were before: the last modality is cut off."""
    old = {}
    for name, value in tensors.items():
        if name.endswith("pair_bias") and value.shape[1] == 4:
            value = value[:, :3, :3]
        elif name.endswith(("_map", "_tower")) and value.shape[0] == 4:
            value = value[:3]
        old[name] = value.clone()
    return old


def trained(scorer: Scorer) -> Scorer:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return scorer


def layout_of(kind: str) -> TokenLayout:
    return TokenLayout.from_spans([("text", 70), (kind, 90), ("audio", 40), ("text", 20)])


@pytest.mark.parametrize("modalities", [OLD, tuple(Modality), (Modality.VIDEO, *OLD)], ids=len)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("grad", [True, False])
def test_video_is_ranked_as_images_were(
    name: str, modalities: tuple[Modality, ...], grad: bool
) -> None:
    old = cut(trained(MAKERS[name](modalities=OLD)).state_dict())
    scorer = MAKERS[name](modalities=modalities)
    scorer.load_state_dict(old)
    config = small_config(ratio=0.3)
    video, image = layout_of("video"), layout_of("image")
    q, k = random_qk(video, 4, 2, dim=8)
    with torch.set_grad_enabled(grad):
        found, want = (scorer(q, k, layout=x, config=config) for x in (video, image))
    assert found.values.equal(want.values)
    assert mms.select(found, video, config).index.equal(mms.select(want, image, config).index)


@pytest.mark.parametrize("name", ["relevance", "fine"])
def test_what_is_stored_now_keeps_video_apart(name: str) -> None:
    scorer = trained(MAKERS[name]())
    twin = MAKERS[name]()
    twin.load_state_dict(scorer.state_dict())
    for key, value in scorer.state_dict().items():
        assert twin.state_dict()[key].equal(value)
    q, k = random_qk(layout_of("video"), 4, 2, dim=8)
    found, other = (
        twin(q, k, layout=layout_of(kind), config=small_config()) for kind in ("video", "image")
    )
    assert not found.values.equal(other.values)


def test_tensors_of_other_sizes_are_still_refused() -> None:
    state = trained(RelevanceScorer(**SIZES, rank=4)).state_dict()
    for name, few in (("query_tower", 2), ("pair_bias", 1)):
        bad = {**state, name: state[name][:few]}
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            RelevanceScorer(**SIZES, rank=4).load_state_dict(bad)


@pytest.mark.parametrize("kind", ["relevance", "fine"])
@torch.no_grad()
def test_an_old_folder_loads_into_a_model(kind: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = mms.sparsify(build("llama").model, SPARSE, scorer=kind)
    for scorer in mms.scorers_of(model).values():
        trained(scorer)
    ids = long_ids(200)
    want = model(ids).logits
    mms.save_scorers(model, tmp_path)
    tensors = cut(load_file(tmp_path / WEIGHTS))
    save_file({n: v.contiguous() for n, v in tensors.items()}, tmp_path / WEIGHTS)
    record = json.loads((tmp_path / RECORD).read_text())
    del record["config"]["modalities"]
    for entry in record["layers"].values():
        if kind == "fine":
            entry["modalities"] = [m.name for m in OLD]
    (tmp_path / RECORD).write_text(json.dumps(record))
    other = mms.load_scorers(build("llama").model, tmp_path)
    assert mms.sparse_config(other) == SPARSE
    assert other(ids).logits.equal(want)


@pytest.mark.parametrize("name", mms.list_pretrained())
def test_shipped_scorers_load_unchanged(name: str) -> None:
    stored = read_scorers(CHECKPOINTS / name)
    for layer, entry in list(stored.entries.items())[:2]:
        entry = {key: value for key, value in entry.items() if key != "scorer"}
        scorer = FineScorer.from_init_args(**entry)
        parts = ((n.partition(":"), value) for n, value in stored.tensors.items())
        own = {key: value for (n, _, key), value in parts if n == layer}
        scorer.load_state_dict(own)
        for key, value in scorer.state_dict().items():
            part = value[:, :3, :3] if key == "pair_bias" else value
            assert part.equal(own[key])
        assert scorer.pair_bias[:, 3].equal(scorer.pair_bias[:, 1])
        assert scorer.pair_bias[:, :, 3].equal(scorer.pair_bias[:, :, 1])
