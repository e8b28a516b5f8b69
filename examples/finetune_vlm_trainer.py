"""Finetune a vision-language model of a folder, sparse, with `transformers.Trainer` and peft.

python examples/finetune_vlm_trainer.py SmolVLM-Instruct train.jsonl
"""

import argparse

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import mm_sparse as mms
from mm_sparse.recipes.data import Messages
from mm_sparse.recipes.finetuning import ChatCollator


class SparseTrainer(Trainer):
    """The loss of the answers, and what the scorers learn from the model's own attention."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        with mms.distillation_losses(model) as scorers:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        extra = 0.1 * scorers.mean() if model.training else 0
        return (loss[0] + extra, loss[1]) if isinstance(loss, tuple) else loss + extra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="of the model and its processor")
    parser.add_argument("data", help="JSON lines of messages")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of keys that layers keep")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="finetuned")
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.folder)
    model = AutoModelForImageTextToText.from_pretrained(args.folder)
    lora = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(model, lora)
    config = mms.SparseConfig(ratio=args.ratio, bidirectional=())
    mms.sparsify(model, config, scorer="fine")
    mms.register_scorers(model)  # they are among the parameters that the trainer optimizes
    settings = TrainingArguments(
        args.out, max_steps=args.steps, learning_rate=2e-4, per_device_train_batch_size=2,
        remove_unused_columns=False, logging_steps=10, report_to="none",
    )  # fmt: skip
    data = Messages(args.data)
    collator = ChatCollator(processor)
    SparseTrainer(
        model, settings, data_collator=collator, train_dataset=data,
        callbacks=[mms.TrainerScorerCallback()],  # peft writes adapters alone into checkpoints
    ).train()  # fmt: skip
    model.save_pretrained(f"{args.out}/adapter")
    processor.save_pretrained(f"{args.out}/adapter")
    mms.save_scorers(model, f"{args.out}/adapter/scorers")


if __name__ == "__main__":
    main()
