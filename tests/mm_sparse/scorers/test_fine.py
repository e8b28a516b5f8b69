"""The scorer of parts of units: against a loop, against the plain one, and its kernel."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse import FineScorer, Modality, PooledScorer, TokenLayout
from mm_sparse.layout.plan import Plan
from mm_sparse.scorers import block_scores
from tests.support.layouts import (
    GROUPS,
    IDS,
    MIXED,
    assert_equal_where_visible,
    layout_of,
    random_qk,
    small_config,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def by_hand(q: Tensor, k: Tensor, plan: Plan, parts: int) -> Tensor:
    """(B, K, T, U) float64 of an untrained scorer, one tile at a time."""
    batch, kv_heads = k.shape[:2]
    query_pools = min(plan.config.query_pools, plan.tile_tokens)
    width, run = math.ceil(plan.tile_tokens / query_pools), plan.unit // parts
    shape = (batch, kv_heads, plan.tiles.shape[1], plan.units.shape[1])
    values = torch.full(shape, -math.inf, dtype=torch.float64)
    for b in range(batch):
        for t, (start, size) in enumerate(plan.tiles[b].tolist()):
            units = plan.visible[b, t].nonzero().flatten().tolist()
            for h in range(kv_heads if units else 0):
                shares = []
                for at in range(start, start + size, width):
                    end = min(at + width, start + size)
                    for g in range(plan.group):
                        query = (
                            q[b, h * plan.group + g, at:end].double().mean(0) / q.shape[-1] ** 0.5
                        )
                        whole, fine = [], []
                        for u in units:
                            first, count = plan.units[b, u].tolist()
                            keys = k[b, h, first : first + count].double()
                            pieces = keys.split(run)
                            mean = sum(p.mean(0) * len(p) for p in pieces) / count
                            whole.append((query @ mean).exp() * count)
                            fine.append(sum((query @ p.mean(0)).exp() * len(p) for p in pieces))
                        shares.append(torch.stack(fine) / sum(whole))
                stacked = torch.stack(shares)
                best = plan.config.reduce == "max"
                values[b, h, t, units] = (stacked.amax(0) if best else stacked.mean(0)).log()
    return values


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS, ids=lambda x: str(x))
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.thinned(3)
def test_untrained_scores_equal_a_loop_over_parts(
    name: str, heads: int, kv_heads: int, reduce: str
) -> None:
    layout = layout_of(name)
    q, k = random_qk(layout, heads, kv_heads)
    scorer = FineScorer(num_query_heads=heads, num_kv_heads=kv_heads, head_dim=8)
    scores = scorer(q, k, layout=layout, config=small_config(reduce=reduce))
    want = by_hand(q, k, scores.plan, 4)
    assert_equal_where_visible(scores.values, want, scores.plan, 1e-4)


def test_one_part_untrained_is_the_pooled_score() -> None:
    layout = layout_of("padded-left")
    q, k = random_qk(layout, 6, 2)
    scorer = FineScorer(num_query_heads=6, num_kv_heads=2, head_dim=8, parts=1)
    got = scorer(q, k, layout=layout, config=small_config())
    want = PooledScorer()(q, k, layout=layout, config=small_config())
    assert_equal_where_visible(got.values, want.values, want.plan, 1e-5)


def trained(heads: int = 6, kv_heads: int = 2, **options) -> FineScorer:
    scorer = FineScorer(num_query_heads=heads, num_kv_heads=kv_heads, head_dim=8, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    with torch.no_grad():
        scorer.query_size.uniform_(0.5, 2, generator=generator)
        scorer.key_size.uniform_(0.5, 2, generator=generator)
    return scorer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_kernel_equals_the_law(name: str, reduce: str, parts: int, device: str) -> None:
    layout = layout_of(name)
    q, k = random_qk(layout, 6, 2)
    scorer = trained(parts=parts)
    law = scorer(q, k, layout=layout, config=small_config(reduce=reduce, backend="torch"))
    seen = law.plan.visible[:, None].expand_as(law.values)
    scorer.to(device)
    with torch.no_grad():
        got = scorer(
            q.to(device), k.to(device), layout=layout.to(device),
            config=small_config(reduce=reduce, backend="triton"),
        )  # fmt: skip
    assert_close = torch.testing.assert_close
    assert_close(got.values[seen.to(device)].cpu(), law.values.detach()[seen], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("elements", [1, 1 << 19])
def test_scores_in_place_are_those_with_gradients(
    name: str, reduce: str, parts: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_scores, "CACHED_ELEMENTS", elements)
    layout = layout_of(name)
    q, k = random_qk(layout, 6, 2)
    scorer = trained(parts=parts)
    config = small_config(reduce=reduce, backend="torch")
    want = scorer(q, k, layout=layout, config=config)
    with torch.no_grad():
        got = scorer(q, k, layout=layout, config=config)
    assert want.values.requires_grad
    assert_equal_where_visible(got.values, want.values.detach(), want.plan, 1e-5)
    assert got.values.isfinite().all()


def test_gradients_reach_the_maps_of_what_is_there_and_no_other() -> None:
    layout = TokenLayout.from_rows([[("text", 100), ("image", 40), ("text", 40)]])
    q, k = random_qk(layout, 6, 2)
    scorer = FineScorer(num_query_heads=6, num_kv_heads=2, head_dim=8)
    scores = scorer(q, k, layout=layout, config=small_config())
    seen = scores.plan.visible[:, None].expand_as(scores.values)
    scores.values[seen].square().sum().backward()
    for grad in (scorer.query_map.grad, scorer.key_map.grad):
        assert grad is not None
        assert grad.isfinite().all()
        assert (grad[Modality.TEXT] != 0).any()
        assert (grad[Modality.IMAGE] != 0).any()
        assert (grad[Modality.AUDIO] == 0).all()


def test_tokens_without_a_map_count_with_their_means() -> None:
    layout = TokenLayout.from_rows([MIXED])
    q, k = random_qk(layout, 6, 2)
    some = trained(modalities=(Modality.AUDIO,))
    every = trained()
    with torch.no_grad():
        every.load_state_dict({**some.state_dict(), "query_map": every.query_map * 0,
                               "key_map": every.key_map * 0})  # fmt: skip
        every.query_map[Modality.AUDIO] = some.query_map[0]
        every.key_map[Modality.AUDIO] = some.key_map[0]
    a, b = (s(q, k, layout=layout, config=small_config()) for s in (some, every))
    assert_equal_where_visible(a.values, b.values.detach(), a.plan, 1e-5)


def test_one_map_and_one_bias_for_all_know_no_modality() -> None:
    layout = TokenLayout.from_rows([MIXED])
    other = replace(layout, modality=(layout.modality + 1) % len(Modality), memo={})
    q, k = random_qk(layout, 6, 2)
    config = small_config(bidirectional=())  # what is visible must not change
    blind, some = trained(modalities=None, pairs=False), trained(modalities=None)
    for scorer, changes in ((blind, False), (some, True)):
        a, b = (scorer(q, k, layout=x, config=config) for x in (layout, other))
        change = torch.where(a.plan.visible[:, None], a.values - b.values, 0)
        assert bool(change.any()) == changes


def test_a_shared_map_is_the_same_map_for_each() -> None:
    layout = TokenLayout.from_rows([MIXED])
    q, k = random_qk(layout, 6, 2)
    blind, every = trained(modalities=None, pairs=False), trained()
    with torch.no_grad():
        for name, own in every.named_parameters():
            own.copy_(blind.get_parameter(name).expand_as(own))
        every.query_size.copy_(blind.query_size)
        every.key_size.copy_(blind.key_size)
    a, b = (s(q, k, layout=layout, config=small_config()) for s in (blind, every))
    assert_equal_where_visible(a.values, b.values.detach(), a.plan, 1e-5)


def test_calibration_sets_the_size_of_features() -> None:
    layout = TokenLayout.text(1, 256)
    q, k = random_qk(layout, 6, 2)
    scorer = FineScorer(num_query_heads=6, num_kv_heads=2, head_dim=8)
    plan = layout.plan(small_config(), num_query_heads=6, num_kv_heads=2)
    tiles, units = scorer.features(q * 5, k * 3, plan)
    scorer.calibrate(tiles, units)
    size = (tiles / scorer.query_size[:, None, None]).pow(2).mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(size, torch.ones_like(size), rtol=0, atol=1e-2)
    assert scorer.key_size.mean() > scorer.query_size.mean() / 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parts": 3}, "parts must divide 16, the smallest unit, got 3"),
        ({"parts": 0}, "parts must be a positive int, got 0"),
        ({"head_dim": True}, "head_dim must be a positive int, got True"),
        ({"num_query_heads": 3}, "num_query_heads must be a multiple of num_kv_heads (2), got 3"),
        ({"modalities": ()}, "modalities must be one or more, each once, got ()"),
    ],
)
def test_a_scorer_of_impossible_sizes_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FineScorer(**{"num_query_heads": 4, "num_kv_heads": 2, "head_dim": 8, **given})


def test_pairs_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="pairs must be a bool, got 1"):
        FineScorer(num_query_heads=4, num_kv_heads=2, head_dim=8, pairs=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{}, {"modalities": None, "pairs": False}], ids=["aware", "blind"]
)
def test_it_survives_a_file(tmp_path, options: dict) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    sparse = small_config(dense_below=0)
    mms.sparsify(
        model, sparse,
        scorer=lambda **kw: trained(kw["num_query_heads"], kw["num_kv_heads"], **options),
    )  # fmt: skip
    ids = torch.randint(0, 50, (1, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits
        mms.save_scorers(model, tmp_path)
        mms.densify(model)
        mms.load_scorers(model, tmp_path)
        assert torch.equal(model(ids).logits, want)
    mms.sparsify(model, sparse, scorer="fine")
    from mm_sparse.integrations.state import attention_layers

    kept = next(iter(attention_layers(model).values())).scorer
    assert isinstance(kept, FineScorer)
    assert kept.key_map.any(), "scorers of the same kind stay"
