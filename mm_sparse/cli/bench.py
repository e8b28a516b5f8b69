"""The command `mm-sparse bench`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm_sparse.cli.arguments import head_counts, png_path, positive, seconds, share

MODELS = "qwen2.5-vl-7b, qwen3-vl-8b, qwen2-audio-7b, llama-3-8b"
PARTS = "images, clips or tokens of an input"
FORMS = (
    'stock, varlen, flash, ideal (decoding), or as "sparse-64-0.2" (unit, ratio); behind each '
    '"+compile", "+graph" (decoding), "+scorers" (training)'
)


def bench_parser() -> argparse.ArgumentParser:
    """Options of `mm-sparse bench`."""
    from mm_sparse.bench import FAMILIES

    names = ", ".join(FAMILIES)
    parser = argparse.ArgumentParser(
        prog="mm-sparse bench",
        description="Time attend, and score + select + attend, beside dense and sparse peers. "
        "Times are medians of one run on one machine; ratios count.",
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE.json", help="results; a CSV is written beside it")
    add("--plot", type=png_path, metavar="FILE.png", help="time over length; needs matplotlib")
    add("--tokens", type=positive, nargs="+", metavar="N", help="lengths of a sequence")
    add("--heads", type=head_counts, nargs="+", metavar="Q/KV", help='as in "16/16 32/8"')
    add("--head-dims", type=positive, nargs="+", metavar="D", help="as in 128 64")
    add("--causal", choices=("both", "no", "yes"), help="which masks")
    add(
        "--units",
        type=int,
        nargs="+",
        choices=(16, 32, 64, 128),
        metavar="U",
        help="of 16, 32, 64, 128",
    )
    add("--ratio", type=share, metavar="R", help="share of visible keys kept (0.2; decoding 0.125)")
    add("--only", nargs="+", choices=FAMILIES, metavar="NAME", help=f"of {names}")
    add("--quick", action="store_true", help="head dim 128, units 64 and 16, 60 s; small on a CPU")
    add("--seconds", type=seconds, metavar="S", help="start nothing after S seconds")
    mode = parser.add_argument_group("instead of the shapes, any of")
    mode.add_argument("--decode", action="store_true", help="one step with a long context")
    mode.add_argument("--lengths", action="store_true", help="from which length the whole pays")
    mode.add_argument("--long", action="store_true", help="a fixed budget up to 1048576 tokens")
    mode.add_argument(
        "--overhead", action="store_true", help="Python time of a call, kernels replaced by nothing"
    )
    mode.add_argument("--models", nargs="+", metavar="NAME", help="whole models: " + MODELS)
    models = parser.add_argument_group("whole models (random weights)")
    models.add_argument("--parts", type=positive, nargs="+", metavar="N", help=PARTS)
    models.add_argument("--forms", nargs="+", metavar="FORM", help=FORMS)
    works = ("prefill", "train", "decode", "answer")
    models.add_argument("--work", choices=works, default="prefill",
                        help="first token, LoRA step, a token of decoding, or an answer of 128 "
                        "tokens")  # fmt: skip
    models.add_argument("--repeats", type=positive, default=3, metavar="N",
                        help="runs behind the first, of which the median counts (3)")  # fmt: skip
    models.add_argument("--batch", type=positive, default=1, metavar="N",
                        help="rows of an input of text (1)")  # fmt: skip
    models.add_argument("--small", action="store_true", help="of a size for two CPU cores")
    mode.add_argument("--memory", action="store_true", help="peak memory; needs a CUDA GPU")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Time attention beside dense and sparse baselines on this machine."""
    parser = bench_parser()
    args = parser.parse_args(argv)
    if args.overhead:
        _overhead(args.out)
        return
    if args.models:
        _models(parser, args)
        return
    # Imported behind the parser: help and wrong options need no torch.
    import torch

    from mm_sparse.bench import (
        DecodeBench,
        LongBench,
        MemoryBench,
        Runner,
        Session,
        Shape,
        bench_shapes,
        growth,
        results as report,
    )

    cuda = torch.cuda.is_available()
    if args.memory and not cuda:
        parser.error("argument --memory: needs a CUDA GPU, torch.cuda.is_available() is False")
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    limit = 60.0 if args.quick and args.seconds is None else args.seconds
    session = Session(only=args.only or (), seconds=limit, repeat=0.1 if args.quick else 0.3)
    options = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    content: dict[str, Any] = {"machine": report.machine(device, dtype), "options": options}
    units = args.units or ((128, 64, 16) if cuda and not args.quick else (64, 16))
    ratio = args.ratio or 0.2

    def shapes(tokens: Sequence[int], head_dims: Sequence[int] = ()) -> list[Shape]:
        return [Shape(*s) for s in bench_shapes(args, cuda, tokens, head_dims)]

    def each(which: Sequence[Shape], job: Callable[[Any], None], kind: Any = Runner) -> None:
        for shape in which:
            try:
                job(kind(shape, device, dtype, session))
            # Inputs that do not fit must not end the run either.
            except Exception as error:
                session.skip(f"{shape}", report.reason(error))
            if args.out:
                report.write(args.out, content, session)

    # What a CPU can do in the time: every shape, dense beside sparse, one way.
    short = args.quick and not cuda

    def every(bench: Runner) -> None:
        bench.dense(eager=cuda and not args.quick)
        for unit in units:
            bench.sparse(unit, ratio)
        for block in (128, 64) if cuda else ():
            bench.sparse_peers(block, ratio)

    def part(bench: Runner, names: Sequence[str], ratio: float) -> None:
        bench.dense()
        for unit in args.units or (64, 16):
            bench.sparse(unit, ratio, names)

    try:
        if not (args.decode or args.lengths or args.long or args.memory):
            tokens, head_dims = (16384, 65536) if cuda else (8192,), (128, 64)
            kind = partial(Runner, longest=0) if short else Runner
            tokens = (4096,) if short else tokens
            each(shapes(tokens, () if args.quick else head_dims), every, kind)
        if args.lengths:
            lengths = [1024 << i for i in range(6 if cuda else 4)]
            forward_only = partial(Runner, longest=0)
            each(shapes(lengths), partial(part, names=["whole"], ratio=ratio), forward_only)
            content["break_even"] = report.break_even(session.records)
        if args.decode:
            many = (32, 8, 128, False, 8) if cuda else (8, 2, 64, False, 1)
            contexts = args.tokens or ((32768, 131072) if cuda else (4096,))
            steps = [Shape(n, *many, queries=1) for n in contexts]
            job = partial(part, names=["attend", "select", "whole"], ratio=args.ratio or 0.125)
            each(steps, job, DecodeBench)
        if args.long:
            lengths = [131072 << i if cuda else 1024 << i for i in range(4 if cuda else 2)]
            for unit in args.units or (64, 16):
                each(shapes(lengths), partial(LongBench.whole, unit=unit), LongBench)
            content["growth"] = growth(session.records)
        if args.memory:
            trained = partial(MemoryBench, longest=1 << 40)
            each(shapes((65536,)), partial(part, names=["whole"], ratio=ratio), trained)
    finally:
        if args.out:
            report.write(args.out, content, session)
        print(report.summary(content, session))
        if args.plot and session.records:
            report.plot(args.plot, session.records)


def _models(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """`--models`: a table, and a JSON file."""
    import torch

    from mm_sparse.bench import (
        MODEL_SHAPES,
        ModelTiming,
        as_records,
        machine,
        model_table,
        run_models,
    )  # fmt: skip

    unknown = [name for name in args.models if name not in MODEL_SHAPES]
    if unknown:
        parser.error(f"argument --models: must be of {list(MODEL_SHAPES)}, got {unknown[0]!r}")
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    results: list[ModelTiming] = []

    def keep(result: ModelTiming) -> None:
        # As it comes: what ran is not lost where a later form is stopped.
        results.append(result)
        print(model_table([result]).splitlines()[-1], flush=True)
        if args.out:
            known = {"machine": machine(device, dtype), "weights": "random"}
            content = {**known, "records": as_records(results)}
            args.out.write_text(json.dumps(content, indent=1) + "\n")

    for name in args.models:
        shape = MODEL_SHAPES[name]
        counts = {"images": (8, 32), "clips": (60, 120), "tokens": (32768, 131072)}[shape.part]
        if args.small:
            counts = {"images": (1,), "clips": (2,), "tokens": (4096,)}[shape.part]
        forms = ["stock", "sparse-64-0.2", "sparse-16-0.2"]
        if cuda:
            forms.insert(1, "varlen" if shape.part == "images" else "flash")
        run_models(
            shape, args.parts or counts, args.forms or forms, work=args.work, small=args.small,
            batch=args.batch, repeats=args.repeats, device=device, show=keep,
        )  # fmt: skip
    print(model_table(results))


def _overhead(out: Path | None) -> None:
    """`--overhead`: a table, and a JSON file."""
    # Triton reads it when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from mm_sparse.bench import machine, measure_overhead, overhead_table

    rows = measure_overhead()
    print(overhead_table(rows))
    if out:
        content = {"machine": machine("cpu", torch.float32), "rows": rows}
        out.write_text(json.dumps(content, indent=1) + "\n")
