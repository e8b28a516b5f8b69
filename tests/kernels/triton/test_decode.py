"""Few queries on long lists: parts of lists, and how they are merged."""

import pytest
import torch

import mm_sparse as mms
from mm_sparse.kernels.triton import (
    attention_decode,
    block_scores as score_kernels,
    few_row_scores,
)
from tests.kernels.test_attention import assert_within
from tests.kernels.triton.test_scores_and_topk import (
    DEVICES,
    LONG as ROWS,
    both_ways,
    random_qk,
    scorers_of,
    small,
)
from tests.support.kernel_cases import Case, errors_and_bounds

LONG = [[("text", 1500)], [("text", 900)]]
MIXED = [[("text", 400), ("image", (20, 31)), ("text", 333)]]
SHAPES = [
    Case("one-token", LONG, 4, 1, 64, 16, 64, padding="left", queries=1, config={"ratio": 0.6}),
    Case(
        "five-tokens-G3", LONG, 3, 2, 80, 32, 64, padding="left", queries=5, config={"ratio": 0.6}
    ),
    Case("all-kept", MIXED, 1, 1, 32, 64, 64, queries=1, config={"ratio": 1.0}),
    Case("tile-of-64-rows", MIXED, 8, 1, 128, 16, 64, queries=16, config={"ratio": 0.6}),
]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills up with the parts that each call cuts its lists into."""
    found, asked = [], attention_decode.splits_of_lists
    monkeypatch.setattr(
        attention_decode, "splits_of_lists", lambda *a: found.append(asked(*a)) or found[-1]
    )
    return found


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.thinned(4)
def test_equals_dense_attention_under_its_mask(
    case: Case, dtype: torch.dtype, parts: list[int]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU; the gpu tests run the kernel")
    assert_within(errors_and_bounds(*case.make(dtype, backend="triton")))
    assert parts[0] > 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpu_equals_dense_attention_under_its_mask(
    case: Case, dtype: torch.dtype, parts: list[int]
) -> None:
    assert_within(errors_and_bounds(*case.make(dtype, device="cuda")))
    assert parts[0] > 1


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gpu_a_long_cache(dim: int, parts: list[int]) -> None:
    case = Case("x", [[("text", 20001)]] * 2, 4, 2, dim, 16, 64, queries=1)
    q, k, v, selection = case.make(torch.bfloat16, device="cuda")
    assert_within(errors_and_bounds(q, k, v, selection))
    assert torch.equal(mms.attend(q, k, v, selection), mms.attend(q, k, v, selection))
    assert parts[0] > 8


def test_lists_are_cut_only_where_that_fills_the_gpu() -> None:
    assert attention_decode.splits_of_lists(64, 16384, 132) == 6
    assert attention_decode.splits_of_lists(64, 512, 132) == 2
    assert attention_decode.splits_of_lists(8, 100, 132) == 1
    assert attention_decode.splits_of_lists(128, 16384, 132) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    "cols",
    [16, pytest.param(32, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow), 256],
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "kept"), [(1, 1, 1, True), (8, 2, 3, True), (2, 1, 200, False)]
)
@pytest.mark.thinned(4)
def test_scores_of_few_queries_equal_the_law_whether_few_rows_or_not(
    heads: int,
    kv_heads: int,
    queries: int,
    kept: bool,
    cols: int,
    name: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = mms.TokenLayout.from_rows([ROWS[name]] * 2)
    layout, (q, k) = cpu.to(device), (x.to(device) for x in random_qk(cpu, heads, kv_heads))
    config = small(backend="triton", unit=16, causal=True)
    monkeypatch.setattr(score_kernels, "READ_UNITS", cols)
    if cols < 256:
        # Chunks of two blocks, of which a step takes one, both, or more than there are.
        cut = lambda blocks, units, cols, _: (-(-units // (2 * cols)), 2 * cols)  # noqa: E731
        monkeypatch.setattr(score_kernels, "unit_chunks", cut)
        blocks = score_kernels.share_blocks
        monkeypatch.setattr(score_kernels, "share_blocks", lambda *a: (blocks(*a)[0], 16, 2))
        monkeypatch.setattr(score_kernels, "units_of_block", lambda parts, _: 16)
    launched, run = [], score_kernels.launch
    few = few_row_scores.few_row_logits, few_row_scores.few_row_shares
    monkeypatch.setattr(
        score_kernels, "launch", lambda *a, **k: launched.append(a[0] in few) or run(*a, **k)
    )
    fine = mms.FineScorer(num_query_heads=heads, num_kv_heads=kv_heads, head_dim=q.shape[-1])
    generator = torch.Generator().manual_seed(0)
    for parameter in fine.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    for scorer in (*scorers_of(q, k), fine.to(q.device)):
        exact, scores = both_ways(scorer, q[:, :, -queries:], k, layout, config)
        seen = scores.plan.visible[:, None].expand_as(scores.values)
        torch.testing.assert_close(
            scores.values[seen].cpu().double(), exact[seen.cpu()], rtol=1e-4, atol=1e-4
        )
        assert launched == [kept] * 2
        launched.clear()
        with monkeypatch.context() as without, torch.no_grad():
            without.setattr(score_kernels, "FEW_ROWS", 0)
            again = scorer(q[:, :, -queries:], k, layout=layout, config=config)
        assert launched == [False] * 2
        launched.clear()
        torch.testing.assert_close(again.values[seen], scores.values[seen], rtol=1e-4, atol=1e-4)
        assert (scores.values[~seen] < -1e29).all()
