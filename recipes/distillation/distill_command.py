"""`mm-sparse distill`: scorers for a model in a folder, from texts or conversations."""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse import FineScorer, Modality
from mm_sparse._extras import extra_of
from mm_sparse.cli import positive, share
from mm_sparse.integrations import attention_layers, override_config
from mm_sparse.recipes.distillation.budget_search import LEVELS, Place, costs_of, layer_ratios
from mm_sparse.recipes.distillation.distill_report import (
    Figures,
    Reporter,
    figures_table,
    first_lines,
    layers_of,
    mean,
    outlook,
    write_card,
)
from mm_sparse.recipes.distillation.distiller import DistillationConfig
from mm_sparse.recipes.distillation.first_order_budgets import (
    QUERY_LEVELS,
    ChosenBudgets,
    choose_budgets,
    first_order_costs,
    pair_weights,
    query_pairs,
)
from mm_sparse.recipes.distillation.scorer_trainer import Length, ScorerTrainer, save_state
from mm_sparse.recipes.distillation.training_rows import Batch, open_rows
from mm_sparse.recipes.finetuning import load_model
from mm_sparse.recipes.metrics import output_kl, spread_predictions
from mm_sparse.recipes.models import LanguageConfig
from mm_sparse.recipes.run import (
    device_of,
    is_first,
    join_processes,
    leave_processes,
    load_processor,
    processes,
)
from mm_sparse.recipes.training import OptimizerConfig

STATE, SCORERS = "state.pt", "scorers"
STORED = {"unit": 16, "sinks": 64, "window": 128, "parts": 4}
"""Arguments that `--scorers-from` has its own of, and what they are without."""
NAMED = (
    "folder", "data", "tokens", "seed", "validation", "ratio", *STORED, "dense_layers", "tiles",
    "lr", "dtype", "load_in_4bit", "scorers_from",
)  # fmt: skip
"""Arguments that a run that goes on must have as before."""
MEASURED = (0.25, 0.5, 0.75)
"""Shares of a run at which it is measured, beside its start and its end."""


def distill_parser() -> argparse.ArgumentParser:
    """Options of `mm-sparse distill`."""
    parser = argparse.ArgumentParser(
        prog="mm-sparse distill",
        description="Train scorers for a frozen model in a folder on where its own dense attention "
        "goes, then spread the budgets over its heads. A run that was cut off goes on where the "
        "same command is given again.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", nargs="?",
        help='of a transformers model, a repository of the hub, or "smollm2"')  # fmt: skip
    add("--config", type=Path, metavar="FILE.yaml", help="these options, by name")
    add("--data", nargs="+", metavar="PATH", help="texts, JSON lines with text or messages, files "
        "of text_corpus; also folders and patterns")  # fmt: skip
    add("--tokens", type=positive, default=8192, metavar="N", help="of a row (8192)")
    add("--hours", type=float, metavar="H", help="of training")
    add("--steps", type=int, metavar="S", help="of training, instead of --hours")
    add("--out", type=Path, metavar="DIR", help="gets scorers/, and the state of the run")
    add("--ratio", type=share, metavar="R",
        help="mean share of keys kept (0.2, or that of --scorers-from)")  # fmt: skip
    add("--unit", type=int, choices=(16, 32, 64, 128), help="tokens of a unit (16)")
    add("--dense-layers", nargs="+", default=[], metavar="LAYER", help="that stay dense")
    add("--sinks", type=int, help="first tokens that are always kept (64)")
    add("--window", type=int, help="near tokens that are always kept (128)")
    add("--scorers-from", metavar="FOLDER", help="scorers to start from, with their config")
    add("--parts", type=int, help="of a unit that scorers look at (4)")
    add("--tiles", type=positive, default=24, help="drawn in each layer and step (24)")
    add("--lr", type=float, default=1e-3, help="learning rate (0.001)")
    add("--seed", type=int, default=0)
    add("--validation", type=positive, default=2, metavar="N", help="rows that are held back (2)")
    add("--budgets", choices=("first-order", "search", "none"), default="first-order",
        help="over heads: from estimated costs, measured ones, or the same for all")  # fmt: skip
    add("--draws", type=positive, default=4, help="of first-order costs for each row (4)")
    add("--budget-tokens", type=positive, default=16384, metavar="N",
        help="of a text at most, where budgets are spread (16384)")  # fmt: skip
    add("--save-every", type=positive, default=200, metavar="S", help="steps (200)")
    add("--device", metavar="D", help="cuda where there is one, else cpu")
    add("--dtype", metavar="T", help="of the weights (bfloat16 on a GPU, float32 on a CPU)")
    add("--load-in-4bit", action="store_true", help="hold the weights in 4 bits; bitsandbytes")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments, with those of `--config` behind those of the command line."""
    parser = distill_parser()
    given = parser.parse_args(argv)
    if given.config is not None:
        options = _file_options(parser, given.config)
        # How long a run is has two names: that of the command line comes first.
        for name, other in (("steps", "hours"), ("hours", "steps")):
            if getattr(given, name) is not None:
                options.pop(other, None)
        parser.set_defaults(**options)
        given = parser.parse_args(argv)
    for name, option in (("folder", "FOLDER"), ("data", "--data"), ("out", "--out")):
        if getattr(given, name) is None:
            parser.error(f"{option} must be given, got none")
    for name, value in STORED.items():
        own = getattr(given, name)
        if given.scorers_from is None:
            setattr(given, name, value if own is None else own)
        elif own is not None:
            parser.error(f"--{name} must not be given with --scorers-from: theirs is stored")
    if given.scorers_from is None and given.ratio is None:
        given.ratio = 0.2
    try:
        Length(given.steps, given.hours)
        if not given.lr > 0:
            raise ValueError(f"lr must be positive, got {given.lr}")
        if given.budgets != "none" and (given.ratio or 1) < LEVELS[0]:
            raise ValueError(
                f"ratio must be at least {LEVELS[0]} for budgets over heads, got {given.ratio}: "
                "--budgets none"
            )
    except ValueError as error:
        parser.error(str(error))
    return given


def _file_options(parser: argparse.ArgumentParser, file: Path) -> dict[str, Any]:
    """The options of a YAML file, by name."""
    import yaml

    if not file.is_file():
        parser.error(f"config must be a YAML file, got {str(file)!r}")
    record = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        parser.error(f"config must hold options by name, got {type(record).__name__} in {file}")
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    found: dict[str, Any] = {}
    for key, value in record.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            parser.error(f"config: {key} is no option{meant}")
        many = actions[name].nargs == "+"
        found[name] = [str(x) for x in value] if many and isinstance(value, list) else value
        if many and isinstance(value, str):
            found[name] = [value]
        elif not many and value is not None and not isinstance(value, bool):
            # As if it had been typed: argparse converts and checks strings alone.
            found[name] = str(value)
        if actions[name].choices is not None and found[name] is not None:
            kind: Any = actions[name].type or str
            if kind(found[name]) not in actions[name].choices:
                parser.error(f"config: {key} must be one of {actions[name].choices}, got {value!r}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, spread budgets, write.

    Raises:
        SystemExit: wrong arguments, files or folders, in one sentence; or the run was cut off.

    Example:
        >>> main(["path/to/model", "--data", "texts", "--hours", "1", "--out", "run"])
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        trainer, held = prepare(args)
    except (ImportError, OSError, ValueError) as error:
        # Messages of transformers have several lines.
        said = " ".join(f"{error}{extra_of(error)}".split())
        raise SystemExit(f"mm-sparse distill: {said}") from error
    try:
        distill(args, trainer, held)
    except KeyboardInterrupt:
        if trainer.inside_step:
            # Rows and scorers are not where the step began: what was saved before is whole.
            said = f"stopped inside step {trainer.progress.step + 1}, which is lost"
        else:
            if is_first():
                save_state(run_state(args, trainer), args.out / STATE)
            said = f"stopped at step {trainer.progress.step}"
        raise SystemExit(f"mm-sparse distill: {said}; the same command goes on") from None
    leave_processes()


def prepare(args: argparse.Namespace) -> tuple[ScorerTrainer, list[Batch]]:
    """The trainer of a run, at its start or where it was cut off, and rows that were held back.

    Raises:
        ValueError: an argument does not fit the folder, the data or the run that goes on.
    """
    device = join_processes(device_of(args.device))
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    path = args.out / STATE
    if args.out.exists() and not path.is_file() and (
        not args.out.is_dir() or any(args.out.iterdir())
    ):  # fmt: skip
        raise ValueError(f"out must be new, empty or of a run, got {str(args.out)!r}")
    before = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
    if before is not None:
        for name in NAMED:
            if before["arguments"][name] != getattr(args, name):
                raise ValueError(
                    f"{name} must be {before['arguments'][name]!r} as in the run of {args.out}, "
                    f"got {getattr(args, name)!r}"
                )
    model, processor = load_base(args, device)
    rows = open_rows(args.data, processor, model, args.tokens, args.seed)
    held = rows.hold_back(args.validation)
    words = model.get_input_embeddings().weight.shape[0]
    largest = max(int(batch["input_ids"].max()) for batch in held)
    if largest >= words:
        raise ValueError(f"data must hold ids below {words}, those of the model, got {largest}")
    make_sparse(model, args, modalities_of(processor))
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or args.tokens
    if longest < args.tokens:
        print(f"{args.tokens} tokens are more than the {longest} that the model was made for: "
              "scorers learn where it attends all the same", file=sys.stderr)  # fmt: skip
    warmup = 40 if args.steps is None else min(40, args.steps // 10)
    trainer = ScorerTrainer(
        model, rows, Length(args.steps, args.hours), seed=args.seed,
        goal=DistillationConfig(tiles=args.tiles),
        optimizer=OptimizerConfig(lr=args.lr, warmup=warmup, final=0.0),
        share_sequences=processes() > 1,
    )  # fmt: skip
    if before is not None:
        trainer.restore(before["run"])
    elif args.scorers_from is None:
        trainer.calibrate(held[0])
    return trainer, held


def load_base(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """Model on its device, and processor or tokenizer."""
    if args.folder == "smollm2":
        from mm_sparse.recipes.data import SmolLM2Tokenizer

        model: Any = LanguageConfig("smollm2", options={"dtype": args.dtype}).build(0)
        return model.to(device), SmolLM2Tokenizer().tokenizer
    processor = load_processor(args.folder)
    # Weights of few bits are put where they are read, and stay there.
    options = {"device_map": {"": str(device)}} if args.load_in_4bit else {}
    model = load_model(args.folder, dtype=args.dtype, load_in_4bit=args.load_in_4bit, **options)
    return model if args.load_in_4bit else model.to(device), processor


def modalities_of(processor: Any) -> tuple[Modality, ...]:
    """What a processor takes, text first; frames of videos count as images."""
    parts = {
        Modality.IMAGE: ("image_processor", "video_processor"),
        Modality.AUDIO: ("feature_extractor", "audio_processor"),
    }
    taken = (kind for kind, names in parts.items() if any(getattr(processor, n, 0) for n in names))
    return (Modality.TEXT, *taken)


def make_sparse(model: Any, args: argparse.Namespace, modalities: Sequence[Modality]) -> None:
    """Sparsify a model with scorers that learn; layers that cannot be are named.

    Raises:
        ValueError: no layer can be.
    """
    if args.scorers_from is not None:
        mms.load_scorers(model, args.scorers_from, ratio=args.ratio)
        return
    dense = tuple(int(x) if x.isdecimal() else x for x in args.dense_layers)
    config = mms.SparseConfig.preset(
        "text", ratio=args.ratio, unit=args.unit, sinks=args.sinks, window=args.window,
        dense_layers=dense,
    )  # fmt: skip
    make = partial(FineScorer, parts=args.parts, modalities=modalities)
    mms.sparsify(model, config, scorer=make, strict=False)
    refused = [
        f"{name}: {layer.refusal}"
        for name, layer in attention_layers(model).items()
        if layer.refusal
    ]
    if refused:
        print(f"{len(refused)} layers stay dense, {first_lines(refused, 1)}", file=sys.stderr)


def run_state(args: argparse.Namespace, trainer: ScorerTrainer) -> dict[str, Any]:
    """What `prepare` goes on from."""
    return {"arguments": {name: getattr(args, name) for name in NAMED}, "run": trainer.state()}


def distill(args: argparse.Namespace, trainer: ScorerTrainer, held: list[Batch]) -> None:
    """Train to the end; measure, spread budgets and write scorers and card.

    Of several processes the first one writes, and spreads budgets.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / STATE
    marks = [mark for mark in MEASURED if mark > trainer.done]
    with Reporter(trainer, silent=not is_first()) as reporter, stop_between_steps() as stopped:
        before = trainer.figures(held)
        if not before:
            raise SystemExit(
                "mm-sparse distill: tokens, and what is in data, must be long enough for layers to "
                "have units to choose from beside sinks and window, got "
                f"{held[0]['input_ids'].numel()} tokens"
            )
        reporter.measured(before)

        def after(loss: float) -> None:
            reporter.step(loss)
            if marks and trainer.done >= marks[0]:
                while marks and trainer.done >= marks[0]:
                    marks.pop(0)
                reporter.measured(trainer.figures(held))
            if trainer.progress.step % args.save_every == 0 and is_first():
                save_state(run_state(args, trainer), path)
            if trainer.anyone(bool(stopped)):
                raise KeyboardInterrupt

        trainer.fit(after)
        if not is_first():
            return
        save_state(run_state(args, trainer), path)
        figures = trainer.figures(held)
        reporter.measured(figures)
        reporter.say(f"budgets: {args.budgets}")
        budgets = spread_budgets(args, trainer, held)
    finish(args, trainer, before, figures, budgets)


@contextmanager
def stop_between_steps() -> Iterator[list[int]]:
    """A list that gets a signal to stop, the first of which waits for the end of a step.

    A second one interrupts at once.
    """
    stopped: list[int] = []

    def note(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def spread_budgets(
    args: argparse.Namespace, trainer: ScorerTrainer, held: Sequence[Batch]
) -> ChosenBudgets:
    """Budgets by the way that `--budgets` names, with KL as it was measured.

    Estimated ones are by modality of the queries, too, where a layer has several.
    """
    model, ratio = trainer.model, mms.sparse_config(trainer.model).ratio
    inputs = [trainer.moved(shortened(batch, args.budget_tokens)) for batch in held]
    if args.budgets == "none":
        dense = [spread_predictions(model, own, backend="dense") for own in inputs]
        sparse = [spread_predictions(model, own) for own in inputs]
        kl = sum(map(output_kl, dense, sparse)) / len(inputs)
        return ChosenBudgets({}, 0.0, {0.0: kl})
    costs: dict[Place, list[float]]
    if args.budgets == "search":

        def measure(own: Any, dense: Tensor, **changes: Any) -> float:
            return output_kl(dense, spread_predictions(model, own, **changes))

        cases = [(own, spread_predictions(model, own, backend="dense")) for own in inputs]
        costs = costs_of(model, cases, measure, by_head=True)
    else:
        mixed = any(len(kinds) > 1 for kinds in query_pairs(model, inputs[:1]).values())
        levels = QUERY_LEVELS if mixed else LEVELS
        costs = first_order_costs(
            model, inputs, levels, by_modality=mixed, draws=args.draws, seed=args.seed
        )
        weights = pair_weights(model, inputs, costs)
        return choose_budgets(model, inputs, costs, ratio, levels, weights=weights)
    return choose_budgets(model, inputs, costs, ratio)


def shortened(batch: Batch, tokens: int) -> Batch:
    """The first tokens of a row of text; other batches as they are."""
    if set(batch) != {"input_ids"}:
        return batch
    return {"input_ids": batch["input_ids"][:, :tokens]}


def finish(
    args: argparse.Namespace, trainer: ScorerTrainer, before: Figures, after: Figures,
    budgets: ChosenBudgets,
) -> None:  # fmt: skip
    """Write scorers and card, and print what a reader wants to know."""
    model, now = trainer.model, trainer.progress
    folder = args.out / SCORERS
    changes = {"layer_ratio": layer_ratios(budgets.ratios)} if budgets.ratios else {}
    with override_config(model, **changes):
        mms.save_scorers(model, folder)
    more = outlook(trainer)
    kl, even = budgets.tried[budgets.share], budgets.tried[0.0]
    device = trainer.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    config = mms.sparse_config(model)
    kinds = " and ".join(sorted({type(scorer).__name__ for scorer in trainer.scorers.values()}))
    card = {
        "model": f"{args.folder} ({type(model).__name__}), {args.dtype}",
        "scorer": f"{kinds} for {len(trainer.scorers)} layers",
        "config": f"mean ratio {config.ratio}, units of {config.unit}, sinks {config.sinks}, "
        f"window {config.window}; budgets: {args.budgets}",
        "data": {"files": first_lines(args.data, 10), "about": trainer.rows.about},
        "training": {
            "tokens": now.tokens, "row": args.tokens, "steps": now.step,
            "seconds": round(now.seconds, 1), "seed": args.seed, "lr": args.lr,
        },
        "measured_on": f"{args.validation} rows that were held back from training; budgets were "
        "chosen on them as well",
        "kl": round(kl, 6),
        "kl_with_one_ratio": round(even, 6),
        "kl_by_share_of_the_way_to_spread_budgets": {str(k): v for k, v in budgets.tried.items()},
        "kept_mass": round(mean(after, "kept"), 5),
        "overlap": round(mean(after, "overlap"), 5),
        "layers": layers_of(after),
        "extrapolation": more or "the run was too short for one",
        "hardware": f"{gpu}; torch {torch.__version__}",
    }  # fmt: skip
    write_card(folder, card, args.folder)
    print(figures_table(before, after))
    print(f"KL to the dense model's predictions: {kl:.5f}, with one ratio for all {even:.5f}")
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    print(f"outlook: {more or 'the run was too short for one'}")
    print(f'load: mms.load_scorers(model, "{folder}")')


if __name__ == "__main__":
    main()
