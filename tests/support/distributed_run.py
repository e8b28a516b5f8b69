"""A few steps of a tiny recipe on one or two processes; `test_distributed.py` runs this script.

    python distributed_run.py RECIPE STRATEGY DEVICES STEPS FOLDER [--kill STEP] [--resume]

Writes the loss of every step, mean over processes, to FOLDER/losses.jsonl, and then a checkpoint;
a process that is killed after a step leaves the checkpoint of the step before.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import mm_sparse as mms
from mm_sparse.recipes.data.datamodule import SampleData
from mm_sparse.recipes.datasets.digit_dictation import DictationTokenizer, SpokenWords
from mm_sparse.recipes.datasets.digits import DigitCanvases, DigitTokenizer
from mm_sparse.recipes.models import MultimodalLM
from mm_sparse.recipes.models.audio import AudioConfig
from mm_sparse.recipes.models.language import LanguageConfig
from mm_sparse.recipes.models.vision import VisionConfig
from mm_sparse.recipes.training import Objectives, SequenceParallelStrategy

TIED = "--tied" in sys.argv
SPARSE = mms.SparseConfig(
    ratio=0.4, tile=64, unit=16, sinks=0, window=8, bidirectional=(), dense_below=0
)
LM = LanguageConfig(
    options={
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": TIED,
    }
)
COMMON = {
    "sparse": SPARSE,
    "objectives": Objectives(scorers=0.5, scorers_every=2),
}


class Losses(Callback):
    """Writes every step's loss; ends the process by force after a step if asked to."""

    def __init__(self, path, kill):
        self.path, self.kill = path, kill

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(json.dumps([trainer.global_step, float(loss)]) + "\n")
        if trainer.global_step == self.kill:
            trainer.strategy.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def parts(recipe, batch):
    if recipe == "vlm":
        tower = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
        tower |= {"class_token": False, "global_pool": ""}
        tokenizer, vision = DigitTokenizer(), VisionConfig(image_size=36, options=tower)
        samples = DigitCanvases("train", 24, rows=3, columns=3, questions=2)
        options = {"patch_size": 4}
        model = MultimodalLM(tokenizer, vision=vision, language=LM, **COMMON)
    else:
        tokenizer = DictationTokenizer()
        samples = SpokenWords("train", 24, words=3, speaker="tones")
        options = {"samples_per_token": 640}
        model = MultimodalLM(
            tokenizer, audio=AudioConfig("whisper", options=WHISPER), language=LM,
            sparse_audio=HEARS, **COMMON,
        )  # fmt: skip
    return model, SampleData(samples, tokenizer, batch_size=batch, shuffle=False, **options)


# Without batch norm, whose statistics each process has of its own.
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "max_source_positions": 150,
}
HEARS = mms.SparseConfig(
    ratio=0.4, tile=64, unit=16, causal=False, sinks=0, window=8, bidirectional=(), dense_below=0
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("strategy")
    parser.add_argument("devices", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--tied", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    args.folder.mkdir(parents=True, exist_ok=True)
    # Processes that share sequences are given the same ones.
    rows = 4 if args.strategy.endswith("sequence") else 4 // args.devices
    model, data = parts(args.recipe, rows)

    # Adam would blow up what rounding makes of a gradient that is zero.
    def descend():
        groups = [model.scorers.parameters()]
        groups.append([p for n, p in model.named_parameters() if not n.startswith("scorers.")])
        return torch.optim.SGD([{"params": list(g)} for g in groups], lr=0.05, momentum=0.9)

    model.configure_optimizers = descend
    strategy = args.strategy
    if strategy in ("sequence", "sharded sequence"):
        strategy = SequenceParallelStrategy(args.devices, shard=strategy != "sequence")
    if strategy == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(args.devices, 1, save_distributed_checkpoint=False)
    saver = ModelCheckpoint(
        args.folder, filename="last", every_n_train_steps=1, enable_version_counter=False
    )
    trainer = L.Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        devices=args.devices,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saver, Losses(args.folder / "losses.jsonl", args.kill)],
    )
    trainer.fit(model, data, ckpt_path=args.folder / "last.ckpt" if args.resume else None)


if __name__ == "__main__":
    main()
