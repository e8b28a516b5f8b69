"""Run a recipe sparse and dense, the same steps of both, and write what came out.

    python -m mm_sparse.recipes.run.sparse_vs_dense --config recipes/configs/vlm/smollm2.yaml \\
        --out results.json

More arguments go to both runs, `--trainer.max_steps=50` for one; `{run}` in them becomes the name
of the run, as in `--model.weights=runs/prompts/checkpoints/{run}/last.ckpt`. Two GPUs run them side
by side:

    CUDA_VISIBLE_DEVICES=0 python -m mm_sparse.recipes.run.sparse_vs_dense ... --only sparse \\
        --out sparse.json &
    CUDA_VISIBLE_DEVICES=1 python -m mm_sparse.recipes.run.sparse_vs_dense ... --only dense \\
        --out dense.json
    python -m mm_sparse.recipes.run.sparse_vs_dense --join sparse.json dense.json --out results.json
"""

import argparse
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from mm_sparse.bench import machine
from mm_sparse.recipes.run.settings_cli import SettingsError, program

RUNS = ("sparse", "dense")
SPEEDS = ("matmul_tflops", "copy_gb_per_s")
"""Fields of `mm_sparse.bench.machine` that are measured."""
# What a run without sparse attention sets, where its model has the argument.
DENSE = {
    "sparse": "null",
    "sparse_vision": "null",
    "sparse_audio": "null",
    "scorers_from": "null",
    "objectives.scorers": "0",
}


class StepTimes(Callback):
    """Seconds from the end of one training step to the end of the next, data included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since: float | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._since is not None:
            self.seconds.append(now - self._since)
        self._since = now


def dense_options(config: str) -> list[str]:
    """Options that run the model of a config file dense.

    Raises:
        SettingsError: the file names no class of a model.
    """
    record = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    model = record.get("model") if isinstance(record, dict) else None
    path = model.get("class_path") if isinstance(model, dict) else None
    if not isinstance(path, str):
        raise SettingsError(f"model.class_path of {config} must name a class, got {path!r}")
    module, _, name = path.rpartition(".")
    arguments = inspect.signature(getattr(import_module(module), name)).parameters
    return [
        f"--model.{key}={value}"
        for key, value in DENSE.items()
        if key.partition(".")[0] in arguments
    ]


def prepare(name: str, config: str, options: list[str]) -> Any:
    """Trainer, model and data of a config file, as `RecipeCLI` holds them; nothing has run yet.

    Checkpoints go to a folder called `name` in the folder that the config gives them; logs of the
    run have that name as their version.
    """
    from mm_sparse.recipes.run.lightning_cli import main as recipe

    options = [option.replace("{run}", name) for option in options]
    given = [f"--config={config}", *options, *(dense_options(config) if name == "dense" else [])]
    cli = recipe(given, run=False)
    for checkpoint in cli.trainer.checkpoint_callbacks:
        own: Any = checkpoint
        own.dirpath = str(Path(own.dirpath or cli.trainer.default_root_dir) / name)
    for logger in cli.trainer.loggers:
        if isinstance(logger, (CSVLogger, TensorBoardLogger)):
            # A version of its own, so that curves of both runs lie side by side by name.
            logger._version = name
    return cli


def validation_of(cli: Any, config: str) -> Any:
    """The validation data of what `prepare` made of `config`.

    Raises:
        SettingsError: there is none.
    """
    if cli.datamodule.validation is None:
        raise SettingsError(f"data.validation of {config} must be given, got None")
    return cli.datamodule.validation


@contextmanager
def on_device(cli: Any) -> Iterator[Callable[[Iterable[Any]], Iterator[Any]]]:
    """For those who use a recipe's model without its trainer: on its device, in its precision.

    Gives what brings batches there, one after the other.
    """
    model, device = cli.model, cli.trainer.strategy.root_device
    model.to(device)
    with cli.trainer.precision_plugin.forward_context():
        yield lambda batches: (model.transfer_batch_to_device(b, device, 0) for b in batches)


def run(name: str, config: str, options: list[str]) -> dict[str, Any]:
    """Train as a config file says; figures of the run and of a validation after its last step.

    Raises:
        SettingsError: the config has no validation data; nothing was trained then.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    cli = prepare(name, config, options)
    validation_of(cli, config)
    times = StepTimes()
    cli.trainer.callbacks.append(times)
    cli.trainer.fit(cli.model, cli.datamodule)
    seconds = time.perf_counter() - start
    trained = _peak()
    start = time.perf_counter()
    (scores,) = cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    validation = time.perf_counter() - start
    return {
        "steps": cli.trainer.global_step,
        "seconds": round(seconds, 1),
        "median_step_s": round(statistics.median(times.seconds), 4) if times.seconds else None,
        "peak_gib": trained,
        "validation_s": round(validation, 1),
        **{name: round(value, 4) for name, value in scores.items()},
    }


def _peak() -> float | None:
    """GiB that training has had at most, on a GPU."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def join(paths: list[Path]) -> dict[str, Any]:
    """The records of single runs as one: they must be of one config, machine and options."""
    records = [json.loads(path.read_text()) for path in paths]
    first = {key: records[0][key] for key in ("machine", "config", "options")}
    wanted = {**first, "machine": _without_speeds(first["machine"])}
    for path, record in zip(paths, records, strict=True):
        own = {**record, "machine": _without_speeds(record["machine"])}
        for key, value in wanted.items():
            if own[key] != value:
                raise ValueError(f"{path}: {key} must be {value} as in the first, got {own[key]}")
    runs_by_name = {name: record[name] for name in RUNS for record in records if name in record}
    return {**first, **runs_by_name}


def _without_speeds(machine: dict[str, Any]) -> dict[str, Any]:
    """What is equal in two runs on one machine: all but the speeds that were measured."""
    return {key: value for key, value in machine.items() if key not in SPEEDS}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="recipe to run")
    source.add_argument("--join", type=Path, nargs="+", help="files of single runs: one record")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", choices=RUNS, default=None, help="one run instead of both")
    args, more = parser.parse_known_args()
    if args.join:
        args.out.write_text(json.dumps(join(args.join), indent=1) + "\n")
        return
    # LightningCLI warns of a command line beside the arguments that it is given.
    sys.argv = sys.argv[:1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {**machine(device, torch.float32), "lightning": L.__version__}
    record: dict[str, Any] = {"machine": facts, "config": args.config, "options": more}
    for name in [args.only] if args.only else RUNS:
        record[name] = run(name, args.config, more)
        print(name, json.dumps(record[name]), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    program(main)
