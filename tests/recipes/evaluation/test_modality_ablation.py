"""Scorers with and without knowledge of the modality: side by side, at one density."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import mm_sparse as mms
from mm_sparse import Modality, TokenLayout
from mm_sparse.integrations.context import capture_attention
from mm_sparse.recipes.data.collate import Collator
from mm_sparse.recipes.data.samples import RATE, Sample, Turn
from mm_sparse.recipes.datasets.spoken_stamps import YesNoTokenizer
from mm_sparse.recipes.distillation.joint import fresh, train_jointly
from mm_sparse.recipes.distillation.language import DistillationConfig
from mm_sparse.recipes.evaluation import modality_ablation
from mm_sparse.recipes.evaluation.attention_by_modality import AttentionByModality, kl_by_row
from mm_sparse.recipes.evaluation.modality_ablation_report import pair_table, summary, table
from mm_sparse.recipes.models import MultimodalLM
from mm_sparse.recipes.models.audio import AudioConfig, FrameProjectorConfig
from mm_sparse.recipes.models.language import LanguageConfig
from mm_sparse.recipes.models.vision import ProjectorConfig, VisionConfig
from mm_sparse.recipes.training.optimizer import OptimizerConfig
from tests.support.tiny_recipes import sharpen

TOKENIZER = YesNoTokenizer()
COLLATOR = Collator(TOKENIZER, patch_size=4, samples_per_token=640, max_length=2000)
TOWER = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
TOWER |= {"class_token": False, "global_pool": ""}
LM = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
      "num_key_value_heads": 2}  # fmt: skip
SPARSE = mms.SparseConfig(
    ratio=0.5,
    tile=64,
    unit=16,
    sinks=0,
    window=16,
    query_pools=2,
    bidirectional=(),
    dense_below=0,
    modality_floor=0.15,
)


def omni(sparse: mms.SparseConfig | None = SPARSE, **options: Any) -> MultimodalLM:
    torch.manual_seed(0)
    model = MultimodalLM(
        TOKENIZER, vision=VisionConfig(image_size=32, options=TOWER),
        audio=AudioConfig(options={"width": 16, "depth": 1, "heads": 2}),
        language=LanguageConfig(options=LM),
        projector=ProjectorConfig(), audio_projector=FrameProjectorConfig(),
        sparse=sparse, **options,
    )  # fmt: skip
    sharpen(model.language)
    return model


def batch(seed: int) -> Any:
    """Two samples of two pairs of image and audio."""
    torch.manual_seed(seed)
    turns: list[Turn] = []
    for _ in range(2):
        content = (torch.rand(3, 32, 32), torch.randn(RATE * 2), "is this it?")
        turns += [Turn(content), Turn(("yes",), answer=True)]
    return COLLATOR([Sample(tuple(turns))] * 2)


def options_of(model: MultimodalLM) -> dict[str, dict[str, Any]]:
    return {
        name: {"modalities": tuple(Modality), **own}
        for name, own in modality_ablation.LEARNED.items()
    }


def permuted(layout: TokenLayout) -> TokenLayout:
    """Every token called by the name of another modality; segments stay."""
    return replace(layout, modality=(layout.modality + 1) % len(Modality), memo={})


def test_only_the_aware_scorers_see_modalities() -> None:
    model = omni().eval().requires_grad_(False)
    made, losses = train_jointly(
        model,
        [batch(i) for i in range(4)],
        options_of(model),
        DistillationConfig(0.5),
        OptimizerConfig(lr=0.02),
    )
    calls: list[Any] = []
    with capture_attention(model.language, calls.append), torch.no_grad():
        model(batch(9))
    call = calls[-1]
    layout = call.selection.plan.layout
    assert len(set(layout.modality.flatten().tolist())) == 3
    changed = {}
    for name, own in made.items():
        a, b = (
            own[call.name](call.q, call.k, layout=x, config=call.config).values
            for x in (layout, permuted(layout))
        )
        seen = call.selection.plan.visible[:, None].expand_as(a)
        changed[name] = (a - b)[seen].abs().max().item()
    assert changed.pop("blind") == 0
    assert min(changed.values()) > 1e-4
    assert {len(own) for own in losses.values()} == {4}


def test_variants_have_the_parameters_that_they_should() -> None:
    model = omni()
    shapes = {}
    for name, own in options_of(model).items():
        scorers = fresh(model.language, **own)
        assert len(scorers) == 2
        first = next(iter(scorers.values()))
        shapes[name] = len(first.query_map), len(first.key_map), *first.pair_bias.shape[1:3]
    assert shapes == {
        "blind": (1, 1, 1, 1), "maps": (4, 4, 1, 1), "bias": (1, 1, 4, 4),
        "maps and bias": (4, 4, 4, 4),
    }  # fmt: skip


def test_scorers_learn_as_they_would_alone() -> None:
    model = omni().eval().requires_grad_(False)
    every = options_of(model)
    found = []
    for names in (list(every), ["blind"]):
        torch.manual_seed(0)
        batches = [batch(i) for i in range(3)]
        chosen = {name: every[name] for name in names}
        made, _ = train_jointly(
            model, batches, chosen, DistillationConfig(0.5), OptimizerConfig(lr=0.02)
        )
        found.append(made["blind"])
    for name, scorer in found[0].items():
        for a, b in zip(scorer.parameters(), found[1][name].parameters(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    model = omni()
    return modality_ablation.run(
        model, lambda seed: [batch(10 * seed + i) for i in range(3)], [batch(100), batch(101)],
        seeds=(1, 2), goal=DistillationConfig(0.4, tiles=8), optimizer=OptimizerConfig(lr=0.02),
        floor=0.1,
    )  # fmt: skip


@pytest.mark.slow
def test_every_variant_stands_at_one_density(outcome: dict[str, Any]) -> None:
    rows = outcome["rows"]
    assert list(rows) == list(modality_ablation.VARIANTS)
    densities = {name: row["density"] for name, row in rows.items()}
    # 228 tokens are 18 units, of which a budget holds whole ones: no ratio may hit the target.
    assert max(densities.values()) < min(densities.values()) * 1.02
    assert outcome["density_spread"] < 0.02
    for name, row in rows.items():
        assert row["kl"] >= 0
        assert row["overlap"] <= 1
        assert len(row["kl_by_sample"]) == 4
        seeds = 2 if modality_ablation.VARIANTS[name].learned else 1
        assert len(row["kl_by_seed"]) == len(row["ratios"]) == seeds
        assert {"AUDIO>IMAGE", "TEXT>AUDIO", "IMAGE>IMAGE"} <= set(row["density_by_pair"])
    assert rows["oracle"]["overlap"] == 1.0
    assert rows["blind"]["kl_change"] == 0
    sizes = {name: row["parameters"] for name, row in rows.items()}
    assert sizes["blind"] < sizes["bias"] < sizes["maps"] < sizes["maps and bias"]
    assert sizes["pooled, untrained"] == sizes["parts, untrained"] == sizes["oracle"] == 0


@pytest.mark.slow
def test_attention_of_a_query_adds_up_to_one(outcome: dict[str, Any]) -> None:
    found = outcome["dense"]["attention_by_pair"]
    # The sequences have no video.
    for kind in set(Modality) - {Modality.VIDEO}:
        whole = sum(share for pair, share in found.items() if pair.startswith(f"{kind.name}>"))
        assert whole == pytest.approx(1, abs=1e-3)
    assert 0.99 < sum(outcome["budgets"].values()) <= 1


@pytest.mark.slow
def test_the_outcome_is_json_and_tables(outcome: dict[str, Any]) -> None:
    assert json.loads(json.dumps(outcome)) == outcome
    rows = outcome["rows"]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    assert "TEXT>AUDIO" in pair_table(rows, "kept").splitlines()[0]


def test_the_model_stays_as_it_was() -> None:
    model = omni()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    some = {name: modality_ablation.VARIANTS[name] for name in ("blind", "oracle")}
    modality_ablation.run(model, lambda seed: [batch(0)], [batch(1)], seeds=(0,), variants=some)
    after = model.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sparse in language alone, got \['language', 'vision'\]"):
        modality_ablation.run(
            omni(sparse_vision=replace(SPARSE, causal=False)), lambda _: [], [batch(0)]
        )
    with pytest.raises(ValueError, match="held_out and seeds must not be empty, got 0 batches"):
        modality_ablation.run(omni(), lambda _: [], [])


def test_kept_mass_of_all_is_one() -> None:
    model, override_attention = omni(replace(SPARSE, ratio=1.0)).eval(), AttentionByModality()
    with capture_attention(model.language, override_attention.add), torch.no_grad():
        model(batch(0))
    found = override_attention.figures()
    assert found["density"] == found["kept_mass"] == found["kept"] == found["overlap"] == 1.0


def test_divergence_is_per_row_and_errors_are_over_seeds() -> None:
    dense, sparse = torch.zeros(3, 4), torch.tensor([[0.0] * 4, [0.0] * 4, [9.0, 0, 0, 0]])
    first, second = kl_by_row(dense, sparse, torch.tensor([0, 0, 5]))
    assert first == 0
    assert second > 1
    runs = [
        {"kl": kl, "kl_by_sample": [kl, kl + 1], "overlap_by_pair": {"TEXT>TEXT": kl / 4, **more}}
        for kl, more in ((1.0, {}), (3.0, {"AUDIO>TEXT": 0.5}))
    ]
    found = summary(runs)
    assert found["overlap_by_pair"] == {"TEXT>TEXT": 0.5, "AUDIO>TEXT": 0.5}
    assert (found["kl"], found["kl_se"]) == (2.0, 1.0)
    assert (found["kl_by_sample"], found["kl_se_samples"]) == ([2.0, 3.0], 0.5)
