"""Python time of a sparse attention call, with kernels replaced by nothing.

The calls take the path that they take on a GPU, on CPU tensors and with `TRITON_INTERPRET=1`, down
to the launch of each kernel, which does nothing. What remains is validation, layouts, plans, the
allocation of outputs and the arguments of launches: time that a GPU may have to wait for.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mm_sparse.attention import sparse_attention
from mm_sparse.config import SparseConfig
from mm_sparse.integrations import densify, sparsify
from mm_sparse.layout import TokenLayout
from mm_sparse.scorers import FineScorer, PooledScorer

TOKENS, HEADS, KV_HEADS, DIM, LAYERS = 256, 8, 2, 32, 3
PACKAGE = str(Path(__file__).resolve().parents[1])
KERNELS = ("attention_forward", "attention_decode", "pooling", "block_scores", "topk")
KERNELS += ("two_stage_scores", "merge_outputs")


@contextmanager
def kernels_replaced_by_nothing() -> Iterator[None]:
    """Launches of Triton kernels return at once, around a block.

    Raises:
        RuntimeError: Triton was imported without its interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET must be 1 before triton is imported")
    from importlib import import_module

    modules = [import_module(f"mm_sparse.kernels.triton.{name}") for name in KERNELS]
    launches = [(m, vars(m)["launch"]) for m in modules if "launch" in vars(m)]
    for module, _ in launches:
        vars(module)["launch"] = lambda *args, **constants: None
    try:
        yield
    finally:
        for module, launch in launches:
            vars(module)["launch"] = launch


def microseconds(run: Callable[[], Any], calls: int = 100, repeats: int = 12) -> float:
    """The least of the mean times of a call, in microseconds."""
    for _ in range(10):
        run()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def functions_called(run: Callable[[], Any]) -> tuple[int, int]:
    """Functions of the package that a call enters, and how many of them are open at most."""
    run()
    count: Counter[str] = Counter()
    depth = deepest = 0

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal depth, deepest
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not _is_ours(file):
            return
        if event == "call":
            count[f"{file}:{frame.f_code.co_name}"] += 1
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return sum(count.values()), deepest


def _is_ours(file: str) -> bool:
    beside = os.path.join(os.path.dirname(PACKAGE), "kernels")
    return file.startswith((PACKAGE, beside))


def measure_overhead() -> list[dict[str, Any]]:
    """One row a subject: microseconds of a call, functions entered, functions open at most.

    Needs transformers for the row of a Llama layer; without it that row is missing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = SparseConfig(backend="triton", dense_below=0, bidirectional=())
    rows = []
    try:
        with torch.no_grad(), kernels_replaced_by_nothing():
            q = torch.randn(1, HEADS, TOKENS, DIM)
            k, v = torch.randn(2, 1, KV_HEADS, TOKENS, DIM)
            layout = TokenLayout.text(1, TOKENS)
            sizes: Any = {"num_query_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM}
            for name, scorer in (("pooled", PooledScorer()), ("fine", FineScorer(**sizes))):

                def call(scorer: Any = scorer) -> Any:
                    return sparse_attention(q, k, v, layout=layout, config=config, scorer=scorer)

                rows.append(_row(f"sparse_attention, {name} scorer", call))
            rows += _llama(config)
    finally:
        torch.set_num_threads(threads)
    return rows


def _row(what: str, run: Callable[[], Any]) -> dict[str, Any]:
    entered, deepest = functions_called(run)
    return {
        "what": what,
        "us": round(microseconds(run), 1),
        "functions": entered,
        "depth": deepest,
    }


def _llama(config: SparseConfig) -> list[dict[str, Any]]:
    """Attention calls of a small Llama of random weights, as transformers makes them."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return []
    small: Any = LlamaConfig(
        vocab_size=64, hidden_size=HEADS * DIM, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=TOKENS,
    )  # fmt: skip
    ids = torch.randint(0, 64, (1, TOKENS))
    rows = []
    model = sparsify(LlamaForCausalLM(small).eval(), config)
    what = "attention of a Llama layer, prefill"
    _in_last_layer(lambda: model(ids, use_cache=False), lambda call: rows.append(_row(what, call)))
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :1], past_key_values=cache)
    step = "attention of a Llama layer, step of decoding"
    _in_last_layer(
        lambda: model(ids[:, :1], past_key_values=cache), lambda call: rows.append(_row(step, call))
    )
    densify(model)
    rows.append(_dense_on_top(model, ids))
    return rows


def _in_last_layer(run: Callable[[], Any], measure: Callable[[Callable[[], Any]], Any]) -> None:
    """Give a sparsified model's last attention call in a forward to who measures it.

    Not the first: it makes the layout that all layers of a forward share. Inside of the forward,
    since what is known of it ends with it.
    """
    from transformers import AttentionInterface

    interface: Any = AttentionInterface()
    attend = interface["mm_sparse"]
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == LAYERS:
            measure(lambda: attend(*args, **options))
        return attend(*args, **options)

    AttentionInterface.register("mm_sparse", counted)
    try:
        run()
    finally:
        AttentionInterface.register("mm_sparse", attend)


def _dense_on_top(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """What a call that stays dense takes beside attention that takes no time."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def nothing(module: Any, query: Any, *_: Any, **__: Any) -> Any:
        return query.transpose(1, 2), None

    AttentionInterface.register("nothing", nothing)
    AttentionMaskInterface.register("nothing", sdpa_mask)
    model.set_attn_implementation("nothing")
    sparsify(model, SparseConfig(dense_below=1 << 30))
    rows: list[dict[str, Any]] = []

    def measure(call: Callable[[], Any]) -> None:
        row = _row("a call that stays dense, on top", call)
        q = torch.zeros(1, 1, 1, 1)
        alone = microseconds(lambda: nothing(model, q, q, q, None, dropout=0.0, scaling=1.0))
        rows.append({**row, "us": round(row["us"] - alone, 1)})

    _in_last_layer(lambda: model(ids, use_cache=False), measure)
    densify(model)
    return rows[0]


def overhead_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    width = max(len(row["what"]) for row in rows)
    lines = [f"{'':{width}}  {'us':>8}  {'functions':>9}  {'depth':>5}"]
    for row in rows:
        lines.append(
            f"{row['what']:{width}}  {row['us']:8.1f}  {row['functions']:9d}  {row['depth']:5d}"
        )
    return "\n".join(lines)
