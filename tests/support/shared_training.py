"""Training of a tiny checkpoint by processes that share sequences (gloo).

    python shared_training.py P FOLDER CASE [--kill STEP [--in-step]] [--resume]

FOLDER holds checkpoints "model" and "tied", and "pictures.jsonl". P processes train each CASE
(names with commas, or "all"), and write FOLDER/CASE-P.json: losses by step, and FOLDER/CASE-P.ckpt.
A run that is killed after a step leaves FOLDER/CASE.ckpt of the step before. With --in-step its
last process alone is killed, between the backward pass of that step and the optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import Callback

import mm_sparse as mms
from mm_sparse.recipes.data import Messages
from mm_sparse.recipes.finetuning import ChatData, CheckpointModel
from mm_sparse.recipes.models import LoraConfig
from mm_sparse.recipes.training import Objectives, SequenceParallelStrategy

SPARSE = mms.SparseConfig(
    ratio=0.3, tile=64, unit=16, sinks=0, window=16, dense_below=0, bidirectional=()
)
STEPS = 4


@dataclass(frozen=True)
class Case:
    """How a checkpoint is trained."""

    options: dict[str, Any] = field(default_factory=dict)
    """Of `CheckpointModel`."""
    shard: bool = False
    groups: int = 1
    """Of processes, each with rows of its own; 0 for as many as processes."""
    model: str = "model"
    """Name of the folder, "tied" for one with tied embeddings."""
    rows: int = 2
    """Of all groups, in a batch."""
    trainer: dict[str, Any] = field(default_factory=dict)
    answers: int = 0
    """Tokens of an answer in validation at the end; 0 for no validation, and no export."""
    parts: bool = False
    """Whether checkpoints are folders, to which each process writes its part."""
    close: float = 1e-5
    """Relative error of a loss: what scorers lose is a mean over groups of the means of each."""


SCORERS = Objectives(1.0, 0.5)
CASES = {
    "whole": Case({"objectives": SCORERS}),
    "sharded": Case({"objectives": SCORERS, "checkpointing": True}, shard=True),
    "adapters": Case({"objectives": SCORERS, "lora": LoraConfig(rank=2), "pack": True}),
    "sharded adapters": Case({"lora": LoraConfig(rank=2), "checkpointing": True}, shard=True),
    "clipped": Case({"objectives": SCORERS}, shard=True, trainer={
        "gradient_clip_val": 0.05, "accumulate_grad_batches": 2,
    }),
    "scorers": Case({"objectives": Objectives(0.0, 1.0)}),
    "groups": Case({}, groups=2),
    "sharded groups": Case({"objectives": SCORERS}, shard=True, groups=2, close=1e-3),
    "answers": Case({"objectives": SCORERS}, answers=4),
    "tied": Case({"objectives": SCORERS}, shard=True, model="tied"),
    "rows": Case({"objectives": SCORERS}, groups=0, close=1e-3),
    "sharded rows": Case({}, shard=True, groups=0, answers=4),
    "sharded answers": Case({"objectives": SCORERS}, shard=True, answers=4),
    "parts": Case({"objectives": SCORERS}, shard=True, parts=True),
    "parts of adapters": Case(
        {"objectives": SCORERS, "lora": LoraConfig(rank=2)}, shard=True, parts=True
    ),
    "parts of whole": Case({"objectives": SCORERS}, parts=True),
    "adapters' answers": Case({"lora": LoraConfig(rank=2)}, shard=True, answers=4),
}  # fmt: skip


class Losses(Callback):
    """Writes the loss of every step, mean over processes; kills the process after one if asked."""

    def __init__(self, path: Path | None, kill: int = 0) -> None:
        self.path, self.kill, self.losses = path, kill, list[float]()

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, *_: Any) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        self.losses.append(float(loss))
        if self.path is not None and trainer.is_global_zero:
            self.path.write_text(json.dumps(self.losses))
        if self.kill and trainer.global_step == self.kill:
            trainer.strategy.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def make_comparable(module: Any) -> None:
    """Scorers that differ from head to head, and an optimizer that keeps rounding small."""
    torch.manual_seed(3)
    for parameter in module.scorers.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)

    # AdamW would blow up what rounding makes of a gradient that is zero.
    def descend() -> Any:
        learning = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.SGD(learning, lr=0.05, momentum=0.9)

    module.configure_optimizers = descend


def model_of(folder: Path, case: Case, out: Path | None = None) -> CheckpointModel:
    """A model as a case has it, whose scorers differ from head to head.

    Args:
        out: what a case with answers is exported to.
    """
    torch.manual_seed(0)
    module = CheckpointModel(
        str(folder / case.model), SPARSE, scorer="relevance", max_new_tokens=case.answers,
        out=str(out) if case.answers else None, **case.options,
    )  # fmt: skip
    make_comparable(module)
    return module


def data_of(folder: Path, rows: int, validated: bool = False) -> ChatData:
    samples = Messages(str(folder / "pictures.jsonl"))
    return ChatData(
        str(folder / "model"), samples, validation=samples if validated else None,
        batch_size=rows, shuffle=False,
    )  # fmt: skip


def train(
    folder: Path, case: Case, strategy: Any = "auto", devices: int = 1, steps: int = STEPS,
    losses: Losses | None = None, **options: Any,
) -> tuple[CheckpointModel, L.Trainer, list[float]]:  # fmt: skip
    """Some steps of a case; the module, its trainer, and the loss of every step."""
    losses = losses or Losses(None)
    name = next((n for n, c in CASES.items() if c is case), "case")
    module = model_of(folder, case, folder / f"{name}-{devices}")
    groups = (case.groups or devices) if strategy != "auto" else 1
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=devices, strategy=strategy, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[losses], **case.trainer,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        data = data_of(folder, case.rows // groups, case.answers > 0)
        trainer.fit(module, data, weights_only=True, **options)
    if case.answers and trainer.is_global_zero:
        found = {n: float(x) for n, x in trainer.callback_metrics.items() if "validation" in n}
        (folder / f"{name}-{devices}-found.json").write_text(json.dumps(found))
    return module, trainer, losses.losses


def strategy_of(case: Case, processes: int) -> SequenceParallelStrategy:
    return SequenceParallelStrategy(
        processes // (case.groups or processes), shard=case.shard, sharded_checkpoints=case.parts
    )


def cases_for(processes: int) -> list[str]:
    """Those of so many processes."""
    wanted = (1, 0) if processes == 2 else (1, 2)
    return [n for n, c in CASES.items() if c.groups in wanted]


def work(rank: int, processes: int, port: int, folder: Path, names: list[str], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank),
        "NODE_RANK": "0", "WORLD_SIZE": str(processes),
    }  # fmt: skip
    for name in names:
        case = CASES[name]
        losses = Losses(folder / f"{name}-{processes}.json", args.kill)
        saved = folder / f"{name}.ckpt"
        more = {"ckpt_path": saved} if args.resume else {}
        if args.kill:
            losses = KilledLater(losses.path, args.kill, saved, args.in_step)
        _, trainer, _ = train(
            folder, case, strategy_of(case, processes), processes, losses=losses, **more
        )
        if not args.resume:
            trainer.save_checkpoint(folder / f"{name}-{processes}.ckpt")
    # Threads of gloo that are left may abort a process that ends.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class KilledLater(Losses):
    """Saves a checkpoint after the step before the one after which it is killed."""

    def __init__(self, path: Path | None, kill: int, saved: Path, in_step: bool) -> None:
        super().__init__(path, 0 if in_step else kill)
        self.saved, self.at, self.in_step = saved, kill, in_step

    def on_after_backward(self, trainer: Any, model: Any) -> None:
        last = trainer.global_rank == trainer.world_size - 1
        if self.in_step and last and trainer.global_step == self.at - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, *rest: Any) -> None:
        if trainer.global_step == self.at - 1:
            trainer.save_checkpoint(self.saved)
        super().on_train_batch_end(trainer, model, outputs, *rest)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("processes", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("case")
    parser.add_argument("--kill", type=int, default=0)
    parser.add_argument("--in-step", action="store_true")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    names = cases_for(args.processes) if args.case == "all" else args.case.split(",")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (args.processes, port, args.folder, names, args), nprocs=args.processes)


if __name__ == "__main__":
    main()
