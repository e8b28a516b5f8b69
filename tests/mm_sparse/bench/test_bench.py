import sys
import types

import pytest
import torch
import torch.nn.attention.flex_attention

import mm_sparse as mms
from mm_sparse.bench import baselines, results, runner
from mm_sparse.bench.baselines import Implementation, Problem, inputs, peer_selection, settings
from mm_sparse.bench.runner import Runner, Session, Shape, Timing
from mm_sparse.bench.scenarios import DecodeBench, MemoryBench

SHAPES = [
    pytest.param(Shape(512, 2, 2, 32), id="N512-G1"),
    pytest.param(Shape(512, 4, 2, 32, causal=True), id="N512-G2-causal"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Each contestant runs once."""
    monkeypatch.setattr(runner, "median_ms", lambda run, *_: 1.0 if run() is not None else 0.0)


def record(what, ms, tokens=1024, direction="forward"):
    return Timing(what, tokens, "16/16", 128, False, direction, 0.2, ms, 1.0)


def small_bench(session=None, shape=None, longest=16384):
    shape = shape or Shape(256, 2, 2, 16)
    return Runner(shape, "cpu", torch.float32, session or Session(), longest)


def test_memory_is_a_share_of_the_inputs(monkeypatch):
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    out_bytes = 2 * 256 * 16 * 4
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100 + 5 * out_bytes)
    session = Session()
    memory = MemoryBench(Shape(256, 2, 2, 16), "cpu", torch.float32, session)
    memory.sparse(64, parts=("whole",))
    assert session.records == []
    assert [row["direction"] for row in session.memory] == ["forward", "training"]
    assert {row["share_of_qkv"] for row in session.memory} == {round(4 / 3, 4)}
    assert session.memory[0]["index_bytes"] == 2 * (2 * 2 * 1) + 4 * (2 * 2)
    assert "1.333" in results.summary({"machine": {}}, session)


def test_a_decoding_step_describes_no_unit_but_the_last():
    session = Session()
    step = DecodeBench(Shape(250, 4, 2, 16, True, 1, queries=1), "cpu", torch.float32, session)
    scorer = mms.PooledScorer()
    config = mms.SparseConfig(0.25, sinks=0, window=0, dense_below=0)
    layout = mms.TokenLayout.text(1, 250)
    with torch.no_grad():
        want = scorer(step.q, step.k, layout=layout, config=config).values
        step.scores(scorer, layout, config)
        step.k.data[:, :, :240] = 1e4
        torch.testing.assert_close(step.scores(scorer, layout, config).values, want)
    step.sparse(16, 0.25, ("select", "whole"))
    assert [(r.what, r.direction) for r in session.records] == [
        ("score + select unit 16", "decode"),
        ("score + select + attend unit 16", "decode"),
    ]


def test_ratios_are_to_the_fastest_dense_and_the_fastest_sparse_peer():
    rows = results.ratios(
        [
            record("dense sdpa flash", 8.0),
            record("dense sdpa cudnn", 4.0),
            record("flex blocks 128", 2.0),
            record("cudnn blocks 64", 1.0),
            record("attend unit 16", 0.8),
            record("score + select unit 16", 0.2),
            record("attend unit 16", 3.0, direction="backward"),
        ]
    )
    by_name = {(r["what"], r["direction"]): r for r in rows}
    ours = by_name["attend unit 16", "forward"]
    assert (ours["fastest_dense"], ours["times_dense"]) == ("dense sdpa cudnn", 5.0)
    assert (ours["fastest_sparse_peer"], ours["times_sparse_peer"]) == ("cudnn blocks 64", 1.25)
    assert by_name["dense sdpa flash", "forward"]["times_dense"] == 0.5
    assert by_name["score + select unit 16", "forward"]["times_dense"] is None
    assert by_name["attend unit 16", "backward"]["fastest_dense"] is None


def test_break_even_is_the_first_length_from_which_the_whole_stays_ahead():
    whole = "score + select + attend unit 16"
    times = {1024: (1.0, 0.5), 2048: (1.0, 2.0), 4096: (4.0, 4.0), 8192: (9.0, 3.0)}
    rows = [
        record(what, ms, tokens)
        for tokens, pair in times.items()
        for what, ms in zip(("dense sdpa", whole), pair, strict=True)
    ]
    (row,) = results.break_even(rows)
    assert (row["what"], row["tokens"], row["lengths"]) == (whole, 4096, [1024, 2048, 4096, 8192])
    (row,) = results.break_even(rows[:4])
    assert row["tokens"] is None


def test_table_is_grouped_by_shape_and_aligned():
    rows = [record("dense sdpa", 4.0), record("attend unit 16", 1.0), record("x", 1.0, 64)]
    lines = results.table(rows).splitlines()
    assert lines[0] == "1024 tokens, heads 16/16, head dim 128, not causal, forward"
    assert lines[3].split() == ["attend", "unit", "16", "0.200", "1.000", "1.0", "4.00", "-"]
    assert len({len(line) for line in lines[1:4]}) == 1
    assert lines[5].startswith("64 tokens")


def test_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    whole = "score + select + attend unit 16"
    rows = [record(w, n / s, n) for n in (256, 512) for w, s in (("dense sdpa", 1), (whole, 2))]
    results.plot(tmp_path / "folder" / "plot.png", rows)
    assert (tmp_path / "folder" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_missing_peers_are_skipped_once_with_the_reason(monkeypatch, capsys):
    for name in ("flash_attn", "cudnn"):
        monkeypatch.setitem(sys.modules, name, None)
    session = Session(only=("fa4", "cudnn"))
    for shape in (Shape(256, 2, 2, 16), Shape(512, 2, 2, 16)):
        for block in (128, 64):
            small_bench(session, shape).sparse_peers(block)
    assert [row["what"] for row in session.skipped] == ["flash-attn-4", "cudnn"]
    assert all("ModuleNotFoundError: " in row["why"] for row in session.skipped)
    assert capsys.readouterr().out.count("skipped flash-attn-4: ModuleNotFoundError: ") == 1


def peer(name, build):
    return ((name, name, build, (128, 64)),)


def test_a_peer_that_raises_is_skipped_and_named(monkeypatch):
    def broken(problem, selection):
        raise RuntimeError("no such kernel\nand a long trace")

    monkeypatch.setattr(baselines, "SPARSE_PEERS", peer("flex", broken))
    found = small_bench()
    found.sparse_peers(64)
    (row,) = found.session.skipped
    assert (row["what"], row["tokens"]) == ("flex blocks 64", 256)
    assert row["why"] == "RuntimeError: no such kernel"


def test_a_peer_without_gradients_keeps_its_forward(monkeypatch):
    def forward_only(problem, selection):
        out = baselines.attend_reference(problem, selection)
        return Implementation(lambda: out, problem.leaves, problem.dout)

    monkeypatch.setattr(baselines, "SPARSE_PEERS", peer("flex", forward_only))
    found = small_bench()
    found.sparse_peers(64)
    assert [r.direction for r in found.records] == ["forward"]
    assert [row["direction"] for row in found.session.skipped] == ["backward"]


def test_a_peer_with_another_output_is_skipped(monkeypatch):
    def wrong(problem, selection):
        return Implementation(lambda: problem.leaves[0], problem.leaves, problem.dout)

    monkeypatch.setattr(baselines, "SPARSE_PEERS", peer("flex", wrong))
    found = small_bench()
    found.sparse_peers(64)
    assert found.records == []
    assert "ValueError: its output is off by" in found.session.skipped[0]["why"]


def test_eager_equals_sdpa():
    for shape in (Shape(64, 4, 2, 16), Shape(64, 4, 2, 16, causal=True)):
        q, k, v, dout = inputs(shape, "cpu", torch.float32)
        problem = Problem(shape, (q, k, v), dout)
        with torch.no_grad():
            baselines.eager(problem).check(baselines.sdpa(problem, None).run())


def masked_attention(q, k, v, allowed):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def blocks_to_mask(count, index, size, tokens):
    """(B, H, N, N) bool from lists, as a peer reads them."""
    kept = torch.zeros(*index.shape[:3], tokens // size[1], dtype=torch.bool)
    for place in range(index.shape[-1]):
        here = torch.zeros_like(kept).scatter_(-1, index[..., place : place + 1].long(), True)
        kept |= here & (place < count)[..., None]
    return kept.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)


@pytest.fixture
def fake_fa4(monkeypatch):
    """flash-attn-4 with its names and layouts, computed by a mask from the lists it is given."""

    class Lists:
        def __init__(self, **lists):
            self.__dict__.update(lists)

    def flash_attn_func(q, k, v, mask_mod=None, **lists):
        n = q.shape[1]
        given, back = lists["block_sparse_tensors"], lists["block_sparse_tensors_bwd"]

        def mask(x):
            full = blocks_to_mask(x.full_block_cnt, x.full_block_idx, x.block_size, n)
            return full, blocks_to_mask(x.mask_block_cnt, x.mask_block_idx, x.block_size, n)

        (full, part), (back_full, back_part) = mask(given), mask(back)
        assert torch.equal(full, back_full.mT)
        assert torch.equal(part, back_part.mT)
        at = torch.arange(n)
        if mask_mod is not None:
            part = part & mask_mod(None, None, at[:, None], at[None], None, None)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return masked_attention(*heads_first, full | part).transpose(1, 2), None

    cute = types.ModuleType("flash_attn.cute")
    cute.flash_attn_func = flash_attn_func
    cute.block_sparsity = types.SimpleNamespace(BlockSparseTensorsTorch=Lists)
    cutlass = types.ModuleType("cutlass")
    cutlass.cute = types.SimpleNamespace(jit=lambda f: f)
    for name, module in (("flash_attn", types.ModuleType("flash_attn")), ("cutlass", cutlass)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)


@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attn_4_gets_the_selection(shape, fake_fa4):
    found = small_bench(Session(only=("fa4",)), shape)
    found.sparse_peers(128)
    assert found.session.skipped == []
    assert [r.direction for r in found.records] == ["forward", "backward"]


@pytest.mark.parametrize("block", [64, 128])
def test_cudnn_gets_the_selection(block, monkeypatch):
    def forward(q, k, v, index, blocks, *, sparse_block_size):
        assert index.dtype == torch.int32
        assert index.shape[-1] == blocks
        count = torch.full(index.shape[:3], blocks)
        allowed = blocks_to_mask(count, index, (sparse_block_size,) * 2, q.shape[2])
        return {"o_tensor": masked_attention(q, k, v, allowed), "lse_tensor": None}

    def backward(dout, q, k, v, out, lse, index, blocks, *, sparse_block_size):
        assert dout.shape == out.shape
        return {}

    api = types.ModuleType("cudnn.block_sparse_attention.api")
    api.block_sparse_attention_forward, api.block_sparse_attention_backward = forward, backward
    package = types.ModuleType("cudnn.block_sparse_attention")
    package.api = api
    monkeypatch.setitem(sys.modules, "cudnn", types.ModuleType("cudnn"))
    monkeypatch.setitem(sys.modules, "cudnn.block_sparse_attention", package)
    session = Session(only=("cudnn",))
    small_bench(session, Shape(512, 2, 2, 32)).sparse_peers(block)
    assert session.skipped == []
    assert [r.direction for r in session.records] == ["forward", "backward"]
    small_bench(session, Shape(512, 2, 2, 32, causal=True)).sparse_peers(block)
    assert session.skipped[0]["why"].startswith("NotImplementedError: cuDNN block-sparse")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [64, 128])
def test_flex_attention_gets_the_selection(shape, block, monkeypatch):
    def flex(q, k, v, *, block_mask, enable_gqa, kernel_options):
        n, m = q.shape[2], block_mask
        assert m.seq_lengths == (n, n)
        assert enable_gqa == (q.shape[1] != k.shape[1])
        full = blocks_to_mask(m.full_kv_num_blocks, m.full_kv_indices, m.BLOCK_SIZE, n)
        part = blocks_to_mask(m.kv_num_blocks, m.kv_indices, m.BLOCK_SIZE, n)
        at = torch.arange(n)
        return masked_attention(q, k, v, full | (part & m.mask_mod(at, at, at[:, None], at)))

    # Uncompiled, FlexAttention looks at the function of a mask alone, not at its blocks.
    monkeypatch.setattr(torch.nn.attention.flex_attention, "flex_attention", flex)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = small_bench(Session(only=("flex",)), shape)
    found.sparse_peers(block)
    assert found.session.skipped == []
    assert [r.direction for r in found.records] == ["forward", "backward"]


def test_long_lists_that_are_not_causal_are_even():
    for tokens in (16384, 65536):
        for block in (64, 128):
            config = settings(Shape(tokens), block, 0.2)
            assert config.tokens % (2 * block) == 0
            assert 0.2 <= config.tokens / tokens < 0.204


def test_peers_run_on_our_selection_where_heads_are_not_shared():
    shape = Shape(512, 2, 2, 32)
    config = settings(shape, 64, 0.2)
    ours = runner.random_selection(shape, config, "cpu")
    assert torch.equal(peer_selection(shape, config, "cpu").index, ours.index)
