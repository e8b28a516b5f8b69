"""Steps of an engine over pages against calls for each sequence alone, its keys side by side."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse.attention import PagedGeometry, PagedLayer, PagedStep, serves_pages
from mm_sparse.scorers import RelevanceScorer, Scorer, ScorerPart
from tests.support.paged_cases import empty_pools, write_tokens

HEADS, KV_HEADS, DIM = 8, 2, 32
SCALE = DIM**-0.5
CONFIG = mms.SparseConfig(
    ratio=0.25, tile=64, sinks=16, window=32, dense_below=0, bidirectional=(), backend="torch"
)
BACKENDS = ["torch", "triton"]


def trained(kind: type[Scorer]) -> Scorer:
    """A scorer whose numbers are not those that it starts with."""
    if kind is mms.PooledScorer:
        return kind()
    torch.manual_seed(5)
    scorer = kind(num_query_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return scorer


class Engine:
    """Sequences in pages, and a layer that serves them."""

    def __init__(
        self, scorer: Scorer, config: mms.SparseConfig = CONFIG, *, page: int = 32,
        dtype: torch.dtype = torch.float32, device: str = "cpu", rows: int = 4,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.config, self.scorer, self.device = config, scorer, device
        memory, per_row = 48, 12
        self.k, self.v = empty_pools(
            "packed-tokens-first", memory, KV_HEADS, page, DIM, dtype, device
        )
        self.table = torch.randperm(memory)[: rows * per_row].view(rows, per_row).int().to(device)
        self.tokens = torch.randn(rows, per_row * page, KV_HEADS, 2 * DIM).to(device, dtype)
        self.geometry = PagedGeometry(
            [config], group=HEADS // KV_HEADS, page=page, rows=rows + 2, pages=per_row,
            memory=memory, device=torch.device(device),
        )  # fmt: skip
        self.layer = PagedLayer(self.geometry, config, scorer)

    def step(
        self, rows: list[int], before: list[int], new: list[int], write: bool = True, **options
    ) -> tuple[Tensor, Tensor, PagedStep]:
        """Queries (N, H, D) and outputs of new tokens of some sequences; rows of -1 are filler."""
        lengths = [a + b for a, b in zip(before, new, strict=True)]
        for row, first, count in zip(rows, before, new, strict=True):
            if row >= 0 and write:
                own = self.tokens[row, first : first + count]
                write_tokens(self.k, self.table[row], own[..., :DIM], first)
                write_tokens(self.v, self.table[row], own[..., DIM:], first)
        starts = [sum(new[:i]) for i in range(len(new) + 1)]
        q = torch.randn(starts[-1], HEADS, DIM, dtype=self.k.dtype).to(self.device)
        table = self.table[rows].clone()
        ends = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        step = self.geometry.step(starts, lengths, ends, table, **options)
        out = torch.full_like(q, float("nan"))
        self.layer.attend(q, self.k, self.v, step, SCALE, out)
        return q, out, step

    def alone(self, row: int, q: Tensor, length: int, **changes) -> Tensor:
        """Outputs (n, H, D) of the last queries of a sequence whose keys lie side by side."""
        keys = self.tokens[row, :length].transpose(0, 1)[None]
        return mms.sparse_attention(
            q.transpose(0, 1)[None], keys[..., :DIM].contiguous(), keys[..., DIM:].contiguous(),
            layout=mms.TokenLayout.text(1, length, device=self.device),
            config=replace(self.config, **changes), scorer=self.scorer, scale=SCALE,
        )[0].transpose(0, 1)  # fmt: skip

    def check(self, rows: list[int], before: list[int], new: list[int], **options) -> None:
        q, out, _ = self.step(rows, before, new, **options)
        first = 0
        for row, length, count in zip(rows, before, new, strict=True):
            own = slice(first, first := first + count)
            want = self.alone(row, q[own], length + count)
            torch.testing.assert_close(out[own], want, atol=2e-3, rtol=1e-3)


def skip_triton(backend: str) -> None:
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("the interpreter is for machines without a GPU; a gpu test runs the kernels")


@pytest.mark.parametrize("kind", [mms.PooledScorer, mms.FineScorer, RelevanceScorer])
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_equal_each_sequence_alone(kind: type[Scorer], backend: str) -> None:
    """Chunks that begin and end anywhere, a mixed batch, and a step of decoding."""
    skip_triton(backend)
    engine = Engine(trained(kind), replace(CONFIG, backend=backend))
    engine.check([0, 1, 2], [0, 0, 0], [150, 300, 64])
    engine.check([1, 0, 2], [300, 150, 64], [1, 49, 20])
    engine.check([0, 1, 2], [199, 301, 84], [1, 1, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_half_precision(backend: str) -> None:
    skip_triton(backend)
    config = replace(CONFIG, backend=backend)
    engine = Engine(trained(mms.FineScorer), config, dtype=torch.float16)
    engine.check([0, 1], [0, 0], [200, 170])
    engine.check([0, 1], [200, 170], [1, 1])


@pytest.mark.parametrize("unit", [16, 32])
def test_budgets_of_heads_and_sizes_of_units(unit: int) -> None:
    config = replace(CONFIG, unit=unit, head_ratio=(0.2, 0.6))
    engine = Engine(mms.PooledScorer(), config)
    engine.check([0, 1], [0, 0], [250, 190])
    engine.check([0, 1], [250, 190], [1, 1])


def test_layers_keep_what_their_own_budgets_say() -> None:
    """Layers share a geometry, and differ in ratios."""
    engine = Engine(mms.PooledScorer())
    configs = [CONFIG, replace(CONFIG, ratio=0.6), replace(CONFIG, head_ratio=(0.2, 0.9))]
    engine.geometry = PagedGeometry(
        configs, group=HEADS // KV_HEADS, page=32, rows=4, pages=12, memory=48,
        device=torch.device("cpu"),
    )  # fmt: skip
    for config in configs:
        engine.config = config
        engine.layer = PagedLayer(engine.geometry, config, engine.scorer)
        engine.check([0, 1], [0, 0], [250, 190])
        engine.check([0, 1], [250, 190], [1, 1])
    with pytest.raises(ValueError, match="one of the geometry's"):
        PagedLayer(engine.geometry, replace(CONFIG, ratio=0.7), engine.scorer)


def test_a_step_is_sparse() -> None:
    """The comparisons above are not of dense attention with itself."""
    engine = Engine(mms.PooledScorer())
    q, out, _ = engine.step([0], [0], [300])
    dense = engine.alone(0, q, 300, ratio=1.0)
    assert (out - dense).abs().max() > 0.01


def test_sequences_that_share_pages_share_descriptors() -> None:
    """As with a cache of prefixes: the second sequence never computes what the first one did."""
    engine = Engine(trained(mms.FineScorer))
    engine.step([0], [0], [128])
    engine.table[1, :4] = engine.table[0, :4]
    engine.tokens[1, :128] = engine.tokens[0, :128]
    engine.check([1], [128], [90])


def test_a_page_that_goes_to_another_sequence_is_described_anew() -> None:
    """As after preemption: nothing of the sequence that held it before is left."""
    engine = Engine(trained(mms.FineScorer))
    engine.step([0], [0], [300])
    engine.table[1] = engine.table[0].flip(0)
    engine.check([1], [0], [300])
    engine.check([1], [300], [1])


def test_filler_changes_nothing() -> None:
    """Engines fill batches up to sizes for which they have recorded graphs."""
    engine = Engine(trained(mms.FineScorer))
    engine.step([0, 1], [0, 0], [200, 120])
    known = engine.layer.units.clone()
    for row, length in ((0, 200), (1, 120)):
        own = engine.tokens[row, length : length + 1]
        write_tokens(engine.k, engine.table[row], own[..., :DIM], length)
        write_tokens(engine.v, engine.table[row], own[..., DIM:], length)
    torch.manual_seed(3)
    q = torch.randn(4, HEADS, DIM)
    table = torch.cat([engine.table[:2], torch.full((2, 12), -1, dtype=torch.int32)])
    ends = torch.tensor([201, 121, 0, 0], dtype=torch.int32)
    step = engine.geometry.step([0, 1, 2, 3, 4], [201, 121, 0, 0], ends, table, recorded=True)
    out = torch.empty_like(q)
    engine.layer.attend(q, engine.k, engine.v, step, SCALE, out)
    for row, length in ((0, 201), (1, 121)):
        torch.testing.assert_close(out[row : row + 1], engine.alone(row, q[row : row + 1], length))
    assert not out[2:].any()
    changed = (engine.layer.units != known).flatten(2).any(-1).any(1).sum()
    assert changed <= 3


def test_short_sequences_are_left_to_dense_attention() -> None:
    engine = Engine(mms.PooledScorer(), replace(CONFIG, dense_below=200))
    _, out, step = engine.step([0, 1, 2, 3], [0, 0, 0, 0], [100, 120, 250, 90])
    assert step.dense == [slice(0, 2), slice(3, 4)]
    assert out[:220].isnan().all()
    assert not out[220:470].isnan().any()
    assert out[470:].isnan().all()
    # Their units are described all the same, for the step in which they are long enough.
    engine.check([0], [100], [150])


def test_a_recorded_step_keeps_all_of_what_is_short() -> None:
    """Which of its sequences are short is not known when a graph is recorded."""
    engine = Engine(mms.PooledScorer(), replace(CONFIG, dense_below=200))
    engine.step([0, 1], [0, 0], [100, 250])
    q, out, step = engine.step([0, 1], [100, 250], [1, 1], recorded=True)
    assert step.dense == []
    dense = engine.alone(0, q[:1], 101, ratio=1.0, dense_below=0)
    torch.testing.assert_close(out[:1], dense)
    torch.testing.assert_close(out[1:], engine.alone(1, q[1:], 251))
    _, _, step = engine.step([0, 2], [101, 0], [1, 64])
    assert step.dense == [slice(0, 2)]


def test_steps_write_where_the_one_before_did() -> None:
    """A graph that was recorded with one step reads the numbers of the next one."""
    engine = Engine(mms.PooledScorer())
    engine.step([0, 1], [0, 0], [100, 250])
    _, _, first = engine.step([0, 1], [100, 250], [1, 1], recorded=True)
    _, _, second = engine.step([1, 0], [251, 101], [1, 1], recorded=True)
    for name in ("units", "span", "unit_modality"):
        a, b = (getattr(step.rows[0].plan, name) for step in (first, second))
        assert a.data_ptr() == b.data_ptr()
    budgets = [step.rows[0].plan.head_budget.data_ptr() for step in (first, second)]
    assert budgets[0] == budgets[1]


@pytest.mark.parametrize("kind", [mms.PooledScorer, mms.FineScorer])
def test_a_step_that_ran_serves_later_ones(kind: type[Scorer]) -> None:
    """As the kernels of a graph do: what it was told lies where later steps write."""
    engine = Engine(trained(kind))
    engine.step([0, 1], [0, 0], [100, 250])
    _, _, recorded = engine.step([0, 1], [100, 250], [1, 1], recorded=True)
    table = recorded.rows[0].table
    for rows, before in (([0, 1], [101, 251]), ([1, 0], [252, 102])):
        for row, first in zip(rows, before, strict=True):
            own = engine.tokens[row, first : first + 1]
            write_tokens(engine.k, engine.table[row], own[..., :DIM], first)
            write_tokens(engine.v, engine.table[row], own[..., DIM:], first)
        table.copy_(engine.table[rows])
        ends = torch.tensor(before, dtype=torch.int32) + 1
        engine.geometry.step([0, 1, 2], ends.tolist(), ends, table, recorded=True)
        q = torch.randn(2, HEADS, DIM)
        out = torch.empty_like(q)
        engine.layer.attend(q, engine.k, engine.v, recorded, SCALE, out)
        for i, row in enumerate(rows):
            want = engine.alone(row, q[i : i + 1], before[i] + 1)
            torch.testing.assert_close(out[i : i + 1], want, atol=2e-3, rtol=1e-3)


def test_a_rank_serves_its_heads() -> None:
    """Scorers are cut by heads, as tensor parallelism cuts queries and keys."""
    whole = trained(mms.FineScorer)
    engine = Engine(whole)
    q, out, _ = engine.step([0], [0], [200])
    part = ScorerPart(whole, (HEADS, KV_HEADS), 1, 2)
    layer = PagedLayer(engine.geometry, CONFIG, part)
    own = slice(HEADS // 2, HEADS)
    starts, ends = [0, 200], torch.tensor([200], dtype=torch.int32)
    step = engine.geometry.step(starts, [200], ends, engine.table[:1])
    found = torch.empty_like(q[:, own])
    layer.attend(q[:, own], engine.k[:, 1:], engine.v[:, 1:], step, SCALE, found)
    torch.testing.assert_close(found, out[:, own])


def test_ratios_by_modality_of_the_queries() -> None:
    """A tile that holds a word has the ratio of text; a step of decoding is text."""
    kinds = {"TEXT": (0.3, 0.9), "IMAGE": 0.1}
    engine = Engine(mms.PooledScorer(), replace(CONFIG, tile=64, query_ratio=kinds))
    modality = torch.full((200,), int(mms.Modality.IMAGE), dtype=torch.int8)
    modality[[70, 199]] = int(mms.Modality.TEXT)
    _, _, step = engine.step([0], [0], [200], modality=modality)
    plan = step.rows[0].plan
    text = torch.tensor([16 * t <= 70 < 16 * t + 16 or t == 12 for t in range(13)])
    assert torch.equal(plan.query_modality[0] == int(mms.Modality.TEXT), text)
    seen = plan.visible_tokens[0]
    for head, ratio in enumerate(kinds["TEXT"]):
        wanted = torch.where(text, seen * ratio, seen * 0.1).round().long()
        assert torch.equal(plan.head_budget[0, head], wanted)
    engine.check([0], [200], [1])
    plain = Engine(mms.PooledScorer(), replace(CONFIG, query_ratio=kinds))
    plain.check([0, 1], [0, 0], [250, 190])
    plain.check([0, 1], [250, 190], [1, 1])


def test_units_have_the_modality_of_their_first_token() -> None:
    """Maps of images describe units of images, also for steps that only read them."""
    engine = Engine(trained(mms.FineScorer))
    kinds = torch.zeros(200, dtype=torch.int8)
    kinds[40:110] = int(mms.Modality.IMAGE)
    engine.step([0], [0], [200], modality=kinds)
    found = engine.geometry.modality[engine.table[0, :7].long()].flatten()[:13]
    # Token 40 stands in the unit that begins with token 32, which is text.
    assert found.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    _, _, step = engine.step([0], [200], [1])
    assert step.rows[0].plan.unit_modality[0, :13].tolist() == found.tolist()
    plain = Engine(trained(mms.FineScorer))
    plain.step([0], [0], [200])
    assert (engine.layer.units != plain.layer.units).any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"causal": False}, "causal"),
        ({"unit": 64}, "whole units of 64"),
        ({"top_p": 0.9}, "top_p"),
        ({"sample_ratio": 0.5}, "sample_ratio"),
        ({"coarse_factor": 4}, "coarse_factor"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes: dict, reason: str) -> None:
    assert reason in serves_pages(replace(CONFIG, **changes), mms.PooledScorer(), 32)


@pytest.mark.parametrize("name", ["group", "page", "rows", "pages", "memory"])
def test_sizes_of_a_geometry_are_at_least_one(name: str) -> None:
    sizes = {"group": 4, "page": 32, "rows": 4, "pages": 4, "memory": 9, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        PagedGeometry([CONFIG], **sizes, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 64}, "configs must differ in ratios alone"),
        ({"head_ratio": (0.2, 0.3, 0.4)}, r"configs must be for as many KV heads, got \[2, 3\]"),
    ],
)
def test_layers_of_a_geometry_differ_in_ratios_alone(changes: dict, words: str) -> None:
    configs = [replace(CONFIG, query_ratio={"TEXT": (0.2, 0.3)}), replace(CONFIG, **changes)]
    sizes = {"group": 4, "page": 32, "rows": 4, "pages": 4, "memory": 9}
    with pytest.raises(ValueError, match=words):
        PagedGeometry(configs, **sizes, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("starts", "lengths", "kinds", "words"),
    [
        ([0], [7], None, "starts must be ascending"),
        ([0, 7, 5], [7, 5], None, "starts must be ascending"),
        ([0, 7], [5], None, "lengths must count the 7 queries, got 5"),
        ([0, 7], [7], 3, "modality must be of 7 tokens of the step, got 3"),
    ],
)
def test_numbers_of_tokens_that_do_not_fit_are_refused(
    starts: list[int], lengths: list[int], kinds: int | None, words: str
) -> None:
    geometry = Engine(mms.PooledScorer()).geometry
    modality = None if kinds is None else torch.zeros(kinds, dtype=torch.int8)
    ends, table = torch.tensor(lengths), torch.arange(12).int().expand(len(lengths), -1)
    with pytest.raises(ValueError, match=words):
        geometry.step(starts, lengths, ends, table, modality=modality)


def test_scorers_that_describe_nothing_are_refused() -> None:
    engine = Engine(mms.PooledScorer())
    with pytest.raises(ValueError, match="SlidingWindow describes no units"):
        PagedLayer(engine.geometry, CONFIG, mms.SlidingWindow())
    with pytest.raises(ValueError, match="at most 384 tokens, got 500"):
        engine.geometry.step([0, 500], [500], torch.tensor([500]), engine.table[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [mms.PooledScorer, mms.FineScorer, RelevanceScorer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_steps_equal_each_sequence_alone(kind: type[Scorer], dtype: torch.dtype) -> None:
    scorer = trained(kind).to("cuda")
    engine = Engine(scorer, replace(CONFIG, backend="auto"), dtype=dtype, device="cuda")
    # What a page holds behind the end of a sequence must be finite.
    engine.k.nan_to_num_(0.0)
    engine.v.nan_to_num_(0.0)
    for rows, before, new in (
        ([0, 1, 2], [0, 0, 0], [150, 300, 64]),
        ([1, 0, 2], [300, 150, 64], [1, 49, 20]),
        ([0, 1, 2], [199, 301, 84], [1, 1, 1]),
    ):
        q, out, _ = engine.step(rows, before, new)
        first, wrong = 0, 0
        for row, length, count in zip(rows, before, new, strict=True):
            own = slice(first, first := first + count)
            want = engine.alone(row, q[own], length + count)
            tolerance = 2e-3 if dtype is torch.float32 else 3e-2
            wrong += ((out[own] - want).abs().amax((1, 2)) > tolerance).sum().item()
        # Rounding decides between units whose scores are equal in it.
        assert wrong <= (0 if dtype is torch.float32 else sum(new) // 20)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [mms.PooledScorer, mms.FineScorer])
def test_gpu_a_recorded_step_serves_later_ones(kind: type[Scorer]) -> None:
    """One CUDA graph, recorded with filler, for steps of other lengths and other sequences."""
    config = replace(CONFIG, backend="auto")
    engine = Engine(trained(kind).to("cuda"), config, dtype=torch.float32, device="cuda")
    engine.k.nan_to_num_(0.0)
    engine.v.nan_to_num_(0.0)
    engine.step([0, 1], [0, 0], [100, 250])
    table = engine.table[:3].clone()
    ends = torch.tensor([101, 251, 0], dtype=torch.int32, device="cuda")
    step = engine.geometry.step([0, 1, 2, 3], [101, 251, 0], ends, table, recorded=True)
    q = torch.randn(3, HEADS, DIM, device="cuda")
    out = torch.empty_like(q)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        engine.layer.attend(q, engine.k, engine.v, step, SCALE, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.layer.attend(q, engine.k, engine.v, step, SCALE, out)
    for rows, before in (([0, 1], [100, 250]), ([1, 0], [251, 101]), ([1], [252])):
        for row, first in zip(rows, before, strict=True):
            own = engine.tokens[row, first : first + 1]
            write_tokens(engine.k, engine.table[row], own[..., :DIM], first)
            write_tokens(engine.v, engine.table[row], own[..., DIM:], first)
        table[: len(rows)] = engine.table[rows]
        lengths = [first + 1 for first in before]
        ends = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        starts = [*range(len(rows) + 1)]
        engine.geometry.step(starts, lengths, ends, table[: len(rows)], recorded=True)
        q.copy_(torch.randn_like(q))
        graph.replay()
        for i, row in enumerate(rows):
            want = engine.alone(row, q[i : i + 1], lengths[i])
            torch.testing.assert_close(out[i : i + 1], want, atol=2e-3, rtol=1e-3)
