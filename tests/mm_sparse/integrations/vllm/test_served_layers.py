"""What of a folder serves which layer of an engine; vLLM itself is not needed for it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mm_sparse as mms
from mm_sparse import Modality
from mm_sparse.checkpoints import read_scorers, scorers_folder
from mm_sparse.integrations.vllm.modality_ranges import (
    runner_of_step,
    token_modality,
    watch_runner,
)
from mm_sparse.integrations.vllm.served_layers import ServedLayers, layer_index, plan_layer
from mm_sparse.integrations.vllm.settings import FOLDER, serving_settings
from mm_sparse.scorers import PooledScorer, ScorerPart

SHIPPED = "smollm2-135m"
SHAPE = (9, 3, 64)
NAME = "model.layers.7.self_attn.attn"


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)


def shipped(**section):
    return serving_settings({"mm_sparse": {"scorers": SHIPPED, **section}})


def test_the_folder_is_named_by_the_environment_or_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(FOLDER, SHIPPED)
    found = serving_settings({})
    assert found.stored is not None
    assert found == shipped()
    monkeypatch.setenv(FOLDER, "no/such/folder/of/anyone")
    assert shipped().config == found.config


def test_what_layers_keep_may_be_changed() -> None:
    stored = read_scorers(scorers_folder(SHIPPED)).config
    found = shipped(ratio=0.1, config={"window": 256, "dense_below": 512})
    assert found.config.ratio == 0.1
    assert found.config.layer_ratio == stored.scaled(0.1).layer_ratio
    assert (found.config.window, found.config.dense_below) == (256, 512)


def test_without_scorers_the_ratio_must_be_said() -> None:
    with pytest.raises(ValueError, match="MM_SPARSE_SCORERS"):
        serving_settings({})
    found = serving_settings({"mm_sparse": {"ratio": 0.3}})
    assert found.stored is None
    assert found.config.ratio == 0.3
    with pytest.raises(ValueError, match=r"got also \['ratios'\]"):
        serving_settings({"mm_sparse": {"ratios": 0.3}})
    with pytest.raises(TypeError, match="must be a mapping"):
        serving_settings({"mm_sparse": 0.3})


def test_images_see_what_the_engine_says() -> None:
    assert serving_settings({"mm_sparse": {"ratio": 0.3}}).config.bidirectional == ()


def test_a_layer_gets_the_scorer_of_its_number() -> None:
    plan = plan_layer(NAME, shipped(), SHAPE, 0, 1)
    assert plan is not None
    assert isinstance(plan.scorer, mms.FineScorer)
    assert plan.config.head_ratio == (0.1, 0.2, 0.7)
    stored = read_scorers(scorers_folder(SHIPPED))
    want = stored.tensors["model.layers.7.self_attn:key_map"].float()
    torch.testing.assert_close(plan.scorer.key_map.detach(), want)
    # A model around the decoder calls it otherwise.
    other = plan_layer("language_model." + NAME, shipped(), SHAPE, 0, 1)
    assert other is not None
    torch.testing.assert_close(other.scorer.key_map, plan.scorer.key_map)


def test_layers_that_stay_dense() -> None:
    assert plan_layer("model.layers.40.self_attn.attn", shipped(), SHAPE, 0, 1) is None
    assert plan_layer(NAME, shipped(config={"dense_layers": (7,)}), SHAPE, 0, 1) is None
    assert plan_layer(NAME, shipped(config={"backend": "dense"}), SHAPE, 0, 1) is None
    with pytest.raises(ValueError, match="number in its name"):
        layer_index("model.attn")


def test_without_scorers_layers_rank_without_training() -> None:
    plan = plan_layer(NAME, serving_settings({"mm_sparse": {"ratio": 0.3}}), SHAPE, 0, 1)
    assert plan is not None
    assert isinstance(plan.scorer, PooledScorer)


def test_ranks_get_their_heads() -> None:
    """Scorers and budgets of KV heads are cut as tensor parallelism cuts heads."""
    plans = [plan_layer(NAME, shipped(), SHAPE, rank, 3) for rank in range(3)]
    assert [plan.config.head_ratio for plan in plans] == [(0.1,), (0.2,), (0.7,)]
    assert all(isinstance(plan.scorer, ScorerPart) for plan in plans)
    whole = plan_layer(NAME, shipped(), SHAPE, 0, 1)
    part = plans[1].scorer._of_heads()
    torch.testing.assert_close(part.key_map, whole.scorer.key_map[:, 1:2])
    with pytest.raises(ValueError, match="has 3 for 2 ranks"):
        plan_layer(NAME, shipped(), SHAPE, 0, 2)


def test_ranks_get_their_heads_of_ratios_by_modality() -> None:
    kinds = {"TEXT": [0.1, 0.2, 0.7], "IMAGE": 0.4}
    config = {"layer_ratio": {str(layer_index(NAME)): kinds}}
    settings = serving_settings({"mm_sparse": {"config": config}})
    for rank, text in enumerate([(0.1,), (0.2,), (0.7,)]):
        plan = plan_layer(NAME, settings, SHAPE, rank, 3)
        assert plan is not None
        assert plan.config.query_ratio == {Modality.TEXT: text, Modality.IMAGE: 0.4}
    with pytest.raises(ValueError, match="a ratio for each of 6 KV heads"):
        plan_layer(NAME, settings, (12, 6, 64), 0, 3)


def test_scorers_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="must hold a scorer for"):
        plan_layer(NAME, shipped(), (32, 8, 128), 0, 1)


def test_configs_that_pages_cannot_serve_are_refused_by_name() -> None:
    plan = plan_layer(NAME, shipped(config={"unit": 64}), SHAPE, 0, 1)
    sizes = {"group": 3, "rows": 4, "pages": 8, "memory": 16, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match="whole units of 64"):
        ServedLayers({NAME: plan}, page=16, **sizes)
    assert ServedLayers({NAME: plan}, page=64, **sizes).layers.keys() == {NAME}


def item(kind: str, *ranges: tuple[int, int]) -> SimpleNamespace:
    """An item of a request, with the engine's ranges, which hold their last token."""
    return SimpleNamespace(
        modality=kind, mm_position=SimpleNamespace(extract_embeds_range=lambda: [*ranges])
    )


def runner_of(requests: dict[str, list]) -> SimpleNamespace:
    return SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=[*requests]),
        requests={name: SimpleNamespace(mm_features=x) for name, x in requests.items()},
    )


def test_tokens_are_what_the_requests_say() -> None:
    """Of a step of decoding, a chunk that begins within an image, and one without items."""
    runner = runner_of(
        {
            "decoding": [item("image", (0, 5))],
            "chunk": [item("image", (2, 4), (6, 9)), item("audio", (12, 13))],
            "text": [],
        }
    )
    starts, lengths = [0, 1, 11, 14], [30, 13, 3]
    assert token_modality(starts, lengths) is None
    with runner_of_step(runner):
        found = token_modality(starts, lengths)
    assert found is not None
    # The chunk holds the tokens 3 to 12 of its request.
    assert found.tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 2, 0, 0, 0]
    with runner_of_step(runner_of({"text": [], "other": []})):
        assert token_modality([0, 4, 8], [4, 4]) is None
    smell = runner_of({"a": [item("smell", (0, 3))]})
    with runner_of_step(smell), pytest.raises(ValueError, match="'smell'"):
        token_modality([0, 8], [8])


def test_a_runner_is_watched_once_and_builds_as_before() -> None:
    class Runner:
        def __init__(self) -> None:
            self.input_batch = SimpleNamespace(req_ids=["a"])
            self.requests = {"a": SimpleNamespace(mm_features=[item("video", (1, 2))])}

        def _build_attention_metadata(self, count: int) -> list[int]:
            found = token_modality([0, count], [count])
            return [] if found is None else found.tolist()

    assert Runner()._build_attention_metadata(4) == []
    watch_runner(Runner)
    once = Runner._build_attention_metadata
    watch_runner(Runner)
    assert Runner._build_attention_metadata is once
    assert Runner()._build_attention_metadata(4) == [0, 3, 3, 0]
    with pytest.raises(ValueError, match="_build_attention_metadata"):
        watch_runner(type("Other", (), {}))


def test_the_entry_point_is_what_the_engine_calls() -> None:
    root = Path(__file__).resolve().parents[4]
    text = (root / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nmm_sparse = ' in text
    assert '"mm_sparse.integrations.vllm:register"' in text
    from mm_sparse.integrations.vllm import register

    assert callable(register)
