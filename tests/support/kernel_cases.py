"""Inputs of every shape that the kernels must serve, and the yardstick that they are held to."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import mm_sparse as mms

Row = list[tuple]


@dataclass(frozen=True)
class Case:
    """One problem: rows of spans, sizes of heads, and fields of the config."""

    name: str
    rows: list[Row]
    group: int = 1
    kv_heads: int = 1
    dim: int = 32
    unit: int = 16
    tile: int = 64
    padding: str = "right"
    queries: int | None = None
    config: dict = field(default_factory=dict)

    def layout(self, device: str = "cpu") -> mms.TokenLayout:
        return mms.TokenLayout.from_rows(self.rows, padding_side=self.padding, device=device)

    def make(
        self, dtype: torch.dtype, device: str = "cpu", backend: str = "auto", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, mms.Selection]:
        layout = self.layout(device)
        n = layout.length if self.queries is None else self.queries
        config = mms.SparseConfig(
            **{
                "unit": self.unit,
                "tile": self.tile,
                "sinks": 4,
                "window": 8,
                "ratio": 0.3,
                "backend": backend,
                **self.config,
            }
        )
        torch.manual_seed(seed)
        heads = self.kv_heads * self.group
        q = torch.randn(layout.batch, heads, n, self.dim, dtype=dtype, device=device)
        k, v = torch.randn(2, layout.batch, self.kv_heads, layout.length, self.dim).to(
            device, dtype
        )
        scores = mms.PooledScorer()(q, k, layout=layout, config=config)
        selection = mms.select(scores, layout, config).check()
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), selection


MIXED = [("text", 21), ("image", (7, 9)), ("text", 33), ("audio", 50), ("text", 5)]
CASES = [
    Case("causal", [[("text", 133)]] * 2, kv_heads=2),
    Case("one-token", [[("text", 1)]], group=3),
    Case("encoder", [[("image", (9, 11))]], config={"causal": False}),
    Case("interleaved-G3-D64", [MIXED], group=3, dim=64),
    Case("documents", [[("text", 60, 0), ("text", 3, 1), ("image", 40, 2), ("text", 30, 2)]]),
    Case("padded-left", [MIXED, [("text", 70)]], padding="left"),
    Case("padded-right-G8", [MIXED, [("text", 70)]], group=8),
    Case("hole", [[("text", 40), ("pad", 13), ("text", 20)], [("text", 73)]]),
    Case(
        "chunked-prefill", [[("text", 150)], [("text", 120)]], padding="left", queries=37, group=3
    ),
    Case("decode", [[("text", 150)], [("text", 90)]], padding="left", queries=1, group=4),
    Case("unit-32-D80", [MIXED], unit=32, dim=80),
    Case("unit-64-tile-128-D96", [MIXED], unit=64, tile=128, dim=96),
    Case("unit-128-D128", [[("text", 200)]], unit=128, dim=128),
    Case("D256", [[("text", 90)]], dim=256),
    Case("heads-in-boxes", [[("text", 128)]], group=4, kv_heads=2, unit=64, tile=128),
    Case("heads-not-in-boxes", [[("text", 128)]], group=2, unit=16, tile=128),
    Case("all-kept", [MIXED], config={"ratio": 1.0}),
    Case("mass", [MIXED], config={"top_p": 0.8}),
    Case("tokens-and-floors", [MIXED], config={"tokens": 48, "modality_floor": 0.2}),
    Case("short-segments", [[("text", 1), ("image", 1)] * 40], group=2),
    Case("nothing-always-kept", [[("text", 100)]], config={"sinks": 0, "window": 0}),
]


def errors_and_bounds(
    q: Tensor, k: Tensor, v: Tensor, selection: mms.Selection, seed: int = 1
) -> list[tuple[str, float, float]]:
    """Largest error of out, dq, dk, dv against float64, and the bound that each is held to.

    The bound: twice what the same arithmetic in plain PyTorch, in the inputs' dtype, gets wrong
    against float64, plus a few roundings of the largest value (a perfect reference would else
    leave no room for the kernel's own last rounding).
    """
    mask = selection.to_dense_mask()
    out = mms.attend(q, k, v, selection)
    torch.manual_seed(seed)
    dout = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, (q, k, v), dout))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact_out = mms.attention_reference(*wide, mask=mask)
    exact = (exact_out, *torch.autograd.grad(exact_out, wide, dout.double()))
    plain_out = mms.attention_reference(q, k, v, mask=mask)
    plain = (plain_out, *torch.autograd.grad(plain_out, (q, k, v), dout))
    eps = torch.finfo(q.dtype).eps
    peak = dout.abs().amax().item() * v.detach().abs().amax().item() * q.shape[-1] ** 0.5
    peak *= max(k.detach().abs().amax().item(), q.detach().abs().amax().item())
    rows = []
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        scale, error, plain_error = (x.detach().abs().max().item() for x in (c, a - c, b - c))
        bound = 2 * plain_error + 4 * eps * scale
        if name in ("dq", "dk"):
            # Both subtract equal terms, sums in float32 of products as large as `peak`.
            bound += 8 * torch.finfo(torch.float32).eps * peak
        rows.append((name, error, bound))
    return rows


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows up as NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
