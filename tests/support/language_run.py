"""`FinetuneLM` in processes that share sequences (gloo), and in one.

    python language_run.py P FOLDER [--resume]

P processes train each of CASES on FOLDER/corpus.npz for four steps and write FOLDER/CASE-P.json:
losses by step, and figures of validation; FOLDER/CASE-P.ckpt, and the model FOLDER/CASE-P.
With --resume they go on in RESUMED from FOLDER/CASE-2.ckpt for two steps.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.multiprocessing as mp

from mm_sparse.recipes.data import CorpusData
from mm_sparse.recipes.models import LanguageConfig, LoraConfig
from mm_sparse.recipes.run.finetune_language import FinetuneLM
from mm_sparse.recipes.training import SequenceParallelStrategy
from tests.support.shared_training import Losses, make_comparable
from tests.support.tiny_recipes import SPARSE, TINY, TOKENS, sharpen

STEPS, MORE = 4, 2


@dataclass(frozen=True)
class Case:
    """How a language model is trained."""

    options: dict[str, Any] = field(default_factory=dict)
    """Of `FinetuneLM`."""
    shard: bool = False
    parts: bool = False
    groups: int = 1
    """Of processes, each with rows of its own."""


CASES = {
    "whole": Case({"scorers_every": 2}),
    "sharded": Case({"scorers_every": 2}, shard=True, parts=True),
    "adapters": Case({"lora": LoraConfig(rank=2)}, shard=True),
    "groups": Case({"scorer_loss": 0.0}, groups=2),
}
RESUMED = ("sharded",)


def model_of(case: Case) -> FinetuneLM:
    """A model that attends unevenly, with scorers that differ from head to head."""
    torch.manual_seed(0)
    module = FinetuneLM(
        LanguageConfig(options={**TINY, "num_key_value_heads": 4}), SPARSE, **case.options
    )
    sharpen(module.language)
    make_comparable(module)
    return module


def train(folder: Path, name: str, processes: int, steps: int, ckpt: Path | None = None) -> None:
    case, strategy = CASES[name], "auto"
    groups = case.groups if processes > 1 else 1
    if processes > 1:
        strategy: Any = SequenceParallelStrategy(
            processes // groups, shard=case.shard, sharded_checkpoints=case.parts
        )
    losses, module = Losses(None), model_of(case)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=processes, strategy=strategy, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[losses], val_check_interval=steps,
        check_val_every_n_epoch=None, gradient_clip_val=1.0,
    )  # fmt: skip
    # 319 tokens: no multiple of the number of processes.
    data = CorpusData(str(folder / "corpus.npz"), TOKENS - 1, length=20, batch_size=2 // groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    found = {n: float(x) for n, x in trainer.callback_metrics.items() if "validation" in n}
    if ckpt is None:
        trainer.save_checkpoint(folder / f"{name}-{processes}.ckpt")
        module.export(folder / f"{name}-{processes}")
    if trainer.is_global_zero:
        record = {"losses": losses.losses, "validation": found}
        (folder / f"{name}-{processes}.json").write_text(json.dumps(record))


def work(rank: int, processes: int, port: int, folder: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank),
        "NODE_RANK": "0", "WORLD_SIZE": str(processes),
    }  # fmt: skip
    for name in RESUMED if resume else CASES:
        saved = folder / f"{name}-2.ckpt" if resume else None
        train(folder, name, processes, STEPS + MORE if resume else STEPS, saved)
    if processes > 1:
        # Threads of gloo that are left may abort a process that ends.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("processes", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.processes == 1:
        for name in RESUMED if args.resume else CASES:
            train(args.folder, name, 1, STEPS + MORE if args.resume else STEPS)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (args.processes, port, args.folder, args.resume), nprocs=args.processes)


if __name__ == "__main__":
    main()
