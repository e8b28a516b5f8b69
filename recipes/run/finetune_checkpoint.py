"""A vision-language or speech-language model of a folder learns on, dense or sparse.

    python -m mm_sparse.recipes.run.finetune_checkpoint fit \\
        --config recipes/configs/finetune/smolvlm.yaml --model.init_args.folder SmolVLM-Instruct \\
        --data.train.init_args.path train.jsonl --data.validation.init_args.path validation.jsonl
"""

from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from mm_sparse.recipes.finetuning import ChatData
from mm_sparse.recipes.run.lightning_cli import RecipeCLI, run_cli
from mm_sparse.recipes.run.settings_cli import program


class CheckpointCLI(RecipeCLI):
    """The processor of the model is that of the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.add_sharing(parser)
        parser.link_arguments("model.init_args.folder", "data.folder")
        parser.link_arguments("model.init_args.processor", "data.processor")
        parser.set_defaults({"seed_everything": 0})


def main(args: Any = None, run: bool = True) -> CheckpointCLI:
    """Fit, validate or predict as the config of the command line says."""
    torch.set_float32_matmul_precision("high")
    return run_cli(CheckpointCLI, ChatData, args, run)


if __name__ == "__main__":
    program(main)
