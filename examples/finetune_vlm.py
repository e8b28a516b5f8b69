"""Finetune a vision-language model of a folder, sparse, under Lightning.

python examples/finetune_vlm.py SmolVLM-Instruct train.jsonl

The data are JSON lines of messages, as docs/how-to/finetune-a-checkpoint.md has them.
"""

import argparse

import lightning as L

import mm_sparse as mms
from mm_sparse.recipes.data import Messages
from mm_sparse.recipes.finetuning import ChatData, CheckpointModel
from mm_sparse.recipes.models import LoraConfig
from mm_sparse.recipes.training import Objectives, OptimizerConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="of the model and its processor")
    parser.add_argument("data", help="JSON lines of messages")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of keys that layers keep")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--out", default="finetuned")
    args = parser.parse_args()

    model = CheckpointModel(
        args.folder,
        mms.SparseConfig(ratio=args.ratio, bidirectional=()),
        objectives=Objectives(language=1.0, scorers=0.1, scorers_every=10),
        lora=LoraConfig(rank=16, alpha=32),
        optimizer=OptimizerConfig(lr=2e-4, warmup=10),
        checkpointing=True,
        max_new_tokens=16,
    )
    samples = Messages(args.data)
    data = ChatData(args.folder, samples, validation=samples, batch_size=args.batch_size)
    trainer = L.Trainer(
        max_steps=args.steps, default_root_dir=args.out, limit_val_batches=8, num_sanity_val_steps=0
    )
    trainer.fit(model, data)
    trainer.validate(model, data)  # prints how well generated answers match
    model.export(f"{args.out}/model")
    print(f"from_pretrained reads {args.out}/model, mms.load_scorers {args.out}/model/scorers")


if __name__ == "__main__":
    main()
