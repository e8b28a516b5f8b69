"""Problems that the kernels for Hopper serve: 16-bit numbers, head dims 64 and 128, full tiles."""

import pytest
import torch

import mm_sparse as mms
from tests.support.kernel_cases import MIXED, Case

LONG = [[("text", 1664)], [("text", 1664)]]
ODD = [("text", 301), ("image", (13, 17)), ("text", 190), ("audio", 77), ("text", 2000)]
SHAPES = [
    # More tiles than a GPU has multiprocessors: programs serve several.
    Case("regular", LONG, 1, 8, 128, 128, 128, config={"causal": False}),
    Case("causal", LONG, 1, 8, 128, 16, 128),
    Case("G3", LONG, 3, 2, 128, 32, 128),
    Case("G8", LONG, 8, 1, 128, 64, 128),
    Case("short-units", [ODD, [("text", 700)]], 4, 2, 128, 16, 128, padding="left"),
    Case("padded-right", [ODD, MIXED], 1, 2, 128, 64, 128),
    Case("documents", [[("text", 60, 0), ("text", 3, 1), ("text", 900, 2)]], 2, 2, 128, 16, 128),
    Case("chunk", [[("text", 3000)]], 4, 2, 128, 16, 128, queries=333),
    Case("all-kept", [ODD], 1, 2, 128, 16, 128, config={"ratio": 1.0}),
    Case("few-keys", [[("text", 3000), ("image", 9)]], 1, 2, 128, 16, 128, config={"tokens": 40}),
    Case(
        "class-token",
        [[("text", 1), ("image", (41, 43))]] * 2,
        1,
        4,
        128,
        16,
        128,
        config={"causal": False},
    ),
    Case("wide-short-units", [ODD, [("text", 700)]], 2, 2, 128, 128, 128, padding="left"),
    Case(
        "wide-class-token",
        [[("text", 1), ("image", (41, 43))]],
        1,
        2,
        128,
        128,
        128,
        config={"causal": False, "sinks": 0, "window": 0, "ratio": 0.6},
    ),
    Case("short-last-unit", [[("text", 1671)]] * 2, 2, 2, 128, 64, 128),
    Case(
        "D64-class-tokens",
        [[("text", 5), ("image", (41, 43))]],
        1,
        12,
        64,
        64,
        128,
        config={"causal": False, "sinks": 0, "window": 0},
    ),
    Case("D64", LONG, 1, 12, 64, 64, 128, config={"causal": False}),
    Case("D64-causal", LONG, 3, 2, 64, 16, 128),
    Case("D64-short-units", [ODD, [("text", 700)]], 4, 2, 64, 32, 128, padding="left"),
]


def need_hopper() -> None:
    """Skip the test elsewhere."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


def up_to_a_short_unit(heads: int, **changes: object) -> mms.Selection:
    """Of 293 keys the first 37, whose third unit is 5 long: the next one begins behind it."""
    layout = mms.TokenLayout.from_spans([("text", 37), ("image", (16, 16))], device="cuda")
    config = mms.SparseConfig(unit=16, tile=128, causal=False, sinks=0, window=0, **changes)
    plan = layout.plan(config, num_query_heads=heads, num_kv_heads=heads)
    kept = torch.zeros(1, heads, plan.tiles.shape[1], plan.units.shape[1], dtype=torch.bool)
    kept[..., :3] = True
    return mms.Selection.from_mask(kept.cuda(), plan)
