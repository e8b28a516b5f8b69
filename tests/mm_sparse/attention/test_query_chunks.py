"""Queries in blocks: what all at once give, in less memory."""

from dataclasses import replace

import pytest
import torch

import mm_sparse as mms
from mm_sparse.attention import query_chunks
from mm_sparse.attention.pipeline import score_select_attend
from mm_sparse.integrations.context import capture_attention
from mm_sparse.layout.call_layout import CallLayout
from mm_sparse.layout.partition import regular_offset
from mm_sparse.layout.plan import Plan
from tests.support.hf_models import SPARSE, build, long_ids

CONFIG = mms.SparseConfig(ratio=0.3, unit=16, tile=64, sinks=4, window=8, dense_below=0)
LENGTH = 610
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def small(monkeypatch):
    """Few scores in memory: a dozen blocks of the calls below."""
    monkeypatch.setattr(query_chunks, "MOST_SCORES", 160)


def tokens(device="cpu", heads=4, kv_heads=2):
    torch.manual_seed(0)
    q = torch.randn(1, heads, LENGTH, 16, device=device)
    k, v = torch.randn(2, 1, kv_heads, LENGTH, 16, device=device).unbind()
    return q, k, v


def layout(kind, device="cpu"):
    if kind in ("text", "two rows"):
        # Their tiles of 32 tokens are all full.
        length = 640 if kind == "two rows" else LENGTH
        return mms.TokenLayout.text(1 if kind == "text" else 2, length, device=device)
    if kind == "rows cut apart":
        rows = [[("text", 300), ("image", 310)], [("text", 500), ("audio", 110)]]
        return mms.TokenLayout.from_rows(rows).to(device)
    if kind == "class token":
        return mms.TokenLayout.from_rows([[("text", 1), ("image", LENGTH - 1)]]).to(device)
    kinds = torch.zeros(1, LENGTH, dtype=torch.int8)
    kinds[:, 40:180] = int(mms.Modality.AUDIO)
    documents = (torch.arange(LENGTH) // 130)[None]
    return mms.TokenLayout.from_modality(kinds, document_ids=documents).to(device)


def cut(layout, config, **queries):
    queries = {"num_queries": layout.length, "query_offset": 0} | queries
    return query_chunks.query_chunks(layout, config, num_query_heads=4, num_kv_heads=2, **queries)


def test_blocks_are_whole_tiles_and_even(monkeypatch):
    monkeypatch.setattr(query_chunks, "MOST_SCORES", 5000)
    found = list(cut(mms.TokenLayout.text(1, 10000), CONFIG))
    assert [b.start for b in found[1:]] == [b.stop for b in found[:-1]]
    assert (found[0].start, found[-1].stop) == (0, 10000)
    sizes = [b.stop - b.start for b in found]
    assert len(set(sizes[:-1])) == 1
    assert sizes[0] % 32 == 0
    assert sizes[0] // 32 * 625 * 2 <= 5000
    assert len(list(cut(mms.TokenLayout.text(1, 100), CONFIG))) == 1


@pytest.mark.parametrize("kind", ["text", "class token", "documents", "two rows", "rows cut apart"])
def test_plans_of_blocks_are_parts_of_the_whole(kind, small):
    """Of one row, or of tiles that are alike in all rows; else they are plans of those queries."""
    own = layout(kind)
    whole = own.plan(CONFIG, num_query_heads=4, num_kv_heads=2)
    tables, always, spans = [], [], []
    for block in cut(own, CONFIG):
        plan = query_chunks.plan_of_chunk(whole, block)
        if kind == "rows cut apart":
            queries = {"num_queries": block.stop - block.start, "query_offset": block.start}
            fresh = layout(kind).plan(CONFIG, num_query_heads=4, num_kv_heads=2, **queries)
            assert torch.equal(plan.tiles, fresh.tiles)
            assert torch.equal(plan.always, fresh.always)
            continue
        start = torch.tensor([block.start, 0])
        tables.append(plan.tiles + start)
        always.append(plan.always)
        spans.append(plan.span)
        assert plan.modalities <= whole.modalities
        assert plan.tile_offset in (
            -1,
            regular_offset(plan.tiles, plan.tile_tokens, plan.num_queries),
        )
        assert (plan.tile_offset < 0) == (whole.tile_offset < 0)
    if tables:
        assert len(tables) > 5
        assert torch.equal(torch.cat(tables, 1), whole.tiles)
        assert torch.equal(torch.cat(always, 1), whole.always)
        assert torch.equal(torch.cat(spans, 1), whole.span)


@pytest.mark.parametrize("device", DEVICES)
def test_of_text_they_give_what_one_call_gives(monkeypatch, device):
    q, k, v = (x.requires_grad_() for x in tokens(device))
    options = {"layout": layout("text", device), "config": CONFIG}
    dout = torch.randn_like(q)
    want = mms.sparse_attention(q, k, v, **options)
    gradients = torch.autograd.grad(want, (q, k, v), dout)
    monkeypatch.setattr(query_chunks, "MOST_SCORES", 160)
    found = mms.sparse_attention(q, k, v, **options)
    torch.testing.assert_close(found, want)
    for one, other in zip(torch.autograd.grad(found, (q, k, v), dout), gradients, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_each_block_follows_its_own_selection(small):
    (q, k, v), own = tokens(), layout("documents")
    selections = []
    out = score_select_attend(
        q, k, v, CallLayout(own, 0), CONFIG, mms.PooledScorer(), q.shape[-1] ** -0.5,
        note=lambda scores, selection: selections.append(selection),
    )  # fmt: skip
    assert len(selections) > 5
    mask = torch.cat([s.to_dense_mask() for s in selections], 2)
    torch.testing.assert_close(out, mms.attention_reference(q, k, v, mask=mask))


@torch.no_grad()
def test_plans_of_blocks_are_not_kept(small):
    (q, k, v), own = tokens(), layout("text")
    mms.sparse_attention(q, k, v, layout=own, config=CONFIG)
    before = set(own.memo)
    mms.sparse_attention(q, k, v, layout=own, config=CONFIG)
    assert set(own.memo) == before
    # That of all queries stays, without anything of tiles times units.
    plans = [value for value in own.memo.values() if isinstance(value, Plan)]
    assert {plan.num_queries for plan in plans} == {LENGTH}
    assert all(set(plan.memo) <= {"modalities", ("sinks", 4)} for plan in plans)


@torch.no_grad()
def test_keys_are_described_once(small, monkeypatch):
    seen = []
    original = mms.PooledScorer.describe

    def describe(self, q, k, plan, scale, cache=None):
        seen.append(cache)
        return original(self, q, k, plan, scale, cache)

    monkeypatch.setattr(mms.PooledScorer, "describe", describe)
    mms.sparse_attention(*tokens(), layout=layout("text"), config=CONFIG)
    assert len(seen) > 5
    assert seen[0] is not None
    assert all(cache is seen[0] for cache in seen)


@torch.no_grad()
def test_a_model_reports_all_blocks(monkeypatch):
    pytest.importorskip("transformers")
    model, ids = mms.sparsify(build("llama").model.eval(), SPARSE), long_ids()
    want = model(ids).logits
    rows = [(row.density, row.pair_density) for row in mms.report(model).rows]
    monkeypatch.setattr(query_chunks, "MOST_SCORES", 40)
    torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
    found = mms.report(model).rows
    for row, (density, pairs) in zip(found, rows, strict=True):
        assert row.density == pytest.approx(density)
        assert row.pair_density == pytest.approx(pairs)


@pytest.mark.parametrize("scorer", [None, "relevance", "fine"])
def test_a_language_model_with_runs_trains_and_generates(scorer):
    model, ids = build("llama").model, long_ids()
    config = replace(SPARSE, ratio=0.2, coarse_factor=2, coarse_budget=1.5)
    mms.sparsify(model, config, scorer=scorer)
    calls = []
    with capture_attention(model, calls.append), torch.no_grad():
        model(ids)
    assert all(call.scores.runs is not None for call in calls)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    answer = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == ids.shape[1] + 3
