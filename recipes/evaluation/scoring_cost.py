"""What scoring and selecting cost in time, beside the attention that they save.

    python -m mm_sparse.recipes.evaluation.scoring_cost language --scorers smollm2-135m \\
        --corpus corpus.npz \\
        --out cost.json
    python -m mm_sparse.recipes.evaluation.scoring_cost images --scorers vit-small-14 \\
        --packed images.npz \\
        --out cost.json

Every layer of a model on one input, by itself, on its own q, k and v; the sums over layers, in
bfloat16 on a GPU, in float32 on a CPU. "ms" is of calls one by one, "kernel_ms" what a GPU computed
in them.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import mm_sparse as mms
from mm_sparse import FineScorer, select
from mm_sparse.attention import attend
from mm_sparse.bench import machine, median_ms
from mm_sparse.encoders.bench import spent
from mm_sparse.integrations import (
    AttentionCall,
    attention_layers,
    capture_attention,
    override_config,
    sparse_config,
)
from mm_sparse.layout import Plan
from mm_sparse.scorers import PooledScorer, Scorer

SECONDS = 0.03
"""That one part of one layer is repeated for."""


def costs(model: nn.Module, run: Callable[[], Any]) -> dict[str, Any]:
    """Rows of times by part, sums over the layers of a sparsified model, and shares of FLOPs.

    Args:
        run: runs the model on one input without padding.
    """
    served, times, work = attention_layers(model), {}, [0.0, 0.0, 0.0]
    backend = sparse_config(model).backend

    def measure(call: AttentionCall) -> None:
        if call.layout is None or call.config is None:
            return
        # The model runs dense meanwhile; what is timed does not.
        call = replace(call, config=replace(call.config, backend=backend))
        scorer = served[call.name].scorer or PooledScorer()
        for part, step in parts_of(call, scorer).items():
            for name, value in time_of(step, call.q.device.type).items():
                times.setdefault(part, {}).setdefault(name, []).append(value)
        for at, value in enumerate(flops_of(call.plan(), scorer, call.q.shape)):
            work[at] += value

    with (
        torch.no_grad(),
        override_config(model, backend="dense"),
        capture_attention(model, measure),
    ):
        run()
    if not times:
        raise ValueError("model must run layers that may be sparse, got none")
    rows = [
        {"part": part} | {name: round(sum(own), 4) for name, own in seconds_by_step.items()}
        for part, seconds_by_step in times.items()
    ]
    dense, products, maps = work
    shares = {"products": products / dense, "maps": maps / dense}
    count = len(next(iter(next(iter(times.values())).values())))
    return {"layers": count, "flops_of_dense": shares, "rows": rows}


def parts_of(call: AttentionCall, scorer: Scorer) -> dict[str, Callable[[], Any]]:
    """What is timed of a layer: score and select, attend, and dense attention by backend."""
    on_gpu = call.q.device.type == "cuda"
    q, k, v = (x.to(torch.bfloat16 if on_gpu else torch.float32) for x in (call.q, call.k, call.v))
    plan = call.plan()
    span = plan.layout.visible_span(plan.config.causal, plan.config.bidirectional)
    causal = not bool((span[..., 1] == plan.layout.length).all())

    def chosen() -> mms.Selection:
        scores = scorer(
            q, k, layout=plan.layout, config=plan.config, query_offset=plan.query_offset,
            scale=call.scale,
        )  # fmt: skip
        return select(scores, plan.layout, plan.config)

    def dense(backend: SDPBackend | None) -> Any:
        options: Any = {"is_causal": causal, "scale": call.scale, "enable_gqa": plan.group > 1}
        if backend is None:
            return scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, **options)

    backends: dict[str, SDPBackend | None] = {"dense sdpa": None}
    if on_gpu:
        backends = {
            "dense sdpa flash": SDPBackend.FLASH_ATTENTION,
            "dense sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        }
    return {
        "score and select": chosen,
        "attend": partial(attend, q, k, v, chosen(), scale=call.scale),
        **{name: partial(dense, backend) for name, backend in backends.items()},
    }


def time_of(run: Callable[[], Any], device: str, calls: int = 3) -> dict[str, float]:
    """Median milliseconds of a call and, on a GPU, those of its kernels."""
    timing = {"ms": median_ms(run, device, SECONDS)}
    if device == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
            for _ in range(calls):
                run()
            torch.cuda.synchronize()
        timing["kernel_ms"] = sum(row["ms"] for row in spent(seen, cuda=True)) / calls
    return timing


def flops_of(plan: Plan, scorer: Scorer, shape: Sequence[int]) -> tuple[float, float, float]:
    """Of dense attention, of a `FineScorer`'s products of descriptors, and of its maps.

    Only what queries see counts. Of another scorer the last two are NaN.
    """
    batch, heads, _, dim = shape
    sizes = plan.tiles[:, :, None, 1] * plan.units[:, None, :, 1]
    dense = 4 * dim * heads * float((sizes * plan.visible).sum())
    if not isinstance(scorer, FineScorer):
        return dense, float("nan"), float("nan")
    query_pools = plan.live_query_pools.shape[2]
    # Query pools meet the parts of a unit for the shares, and the whole unit for their sum.
    descriptors = query_pools * (scorer.parts + (scorer.parts > 1))
    products = 2 * dim * heads * descriptors * float(plan.visible.sum())
    queries = heads * plan.tiles.shape[1] * query_pools
    keys = heads // plan.group * plan.units.shape[1] * scorer.parts
    return dense, products, 2 * 3 * dim * dim * batch * (queries + keys)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: the first word says what model, the others are those of its accuracy."""
    import sys

    words = list(sys.argv[1:] if argv is None else argv)
    kinds = ("language", "images", "speech")
    if not words or words[0] not in (*kinds, "pictures"):
        argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).error(
            f"argument 1: must be one of {kinds}, got {words[:1]}"
        )
    given, model, run, out = language(words[1:]) if words[0] == "language" else tower(words)
    weight = next(model.parameters())
    record = {"machine": machine(weight.device.type, weight.dtype), **given, **costs(model, run)}
    out.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        print(json.dumps(row))


def language(words: Sequence[str]) -> Any:
    """Names, model, a run on the first test sequence, and the file to write."""
    from mm_sparse.recipes.data import CorpusData
    from mm_sparse.recipes.run import add_options, changes_of, prepared

    parser = argparse.ArgumentParser(prog="cost language")
    add_options(parser)
    args = parser.parse_args(words)
    model, _ = prepared(args)
    ids = next(iter(CorpusData(args.corpus, args.tokens).kinds("test").values()))[:1]
    ids = ids.to(next(model.parameters()).device)
    names = {"model": args.model, "scorers": args.scorers, "tokens": ids.shape[1]}

    def run() -> None:
        with override_config(model, **changes_of(args)):
            model.base_model(ids, use_cache=False)

    return names | changes_of(args), model, run, args.out


def tower(words: Sequence[str]) -> Any:
    """The same of an encoder and its first input."""
    from mm_sparse.recipes.evaluation.encoder_quality import options_parser, subject_of

    parser = options_parser()
    options = parser.parse_args(words)
    if options.scorers is None:
        parser.error("argument --scorers: must be given")
    subject = subject_of(options)
    mms.load_scorers(subject.model, options.scorers)
    weight = next(subject.model.parameters())
    names = {"model": subject.facts["model"], "scorers": options.scorers}
    return names, subject.model, lambda: subject.model(subject.batch[:1].to(weight)), options.out


if __name__ == "__main__":
    main()
