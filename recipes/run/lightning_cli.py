"""LightningCLI on a model that a YAML file names, and data made of samples.

    python -m mm_sparse.recipes.run.lightning_cli fit --config recipes/configs/vlm/digits.yaml

`model.class_path` is any LightningModule that takes a `tokenizer`, of this package or of yours; the
file may have any name.
"""

import json
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from mm_sparse.recipes.data import SampleData
from mm_sparse.recipes.run.callbacks import progress_bar
from mm_sparse.recipes.run.settings_cli import SettingsCLI, SettingsError, program
from mm_sparse.recipes.training import SequenceParallelStrategy

C = TypeVar("C", bound=SettingsCLI)


class SharingCLI(SettingsCLI):
    """Settings of how processes share sequences and weights."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.add_sharing(parser)

    def add_sharing(self, parser: LightningArgumentParser) -> None:
        """How processes share sequences and weights: a strategy in three settings."""
        parser.add_argument(
            "--sequence_parallel", type=int, default=1,
            help="processes that share a sequence, of trainer.devices",
        )  # fmt: skip
        parser.add_argument(
            "--shard_weights", type=bool, default=False,
            help="each process holds a part of all weights (FSDP2) instead of all of them",
        )  # fmt: skip
        parser.add_argument(
            "--sharded_checkpoints", type=bool, default=False,
            help="each process writes its part of a checkpoint, a folder, instead of one file",
        )  # fmt: skip

    def strategy(self) -> Any:
        """What the three settings say; None where they say nothing.

        Raises:
            SettingsError: a strategy is named as well.
        """
        size = self._get(self.config_init, "sequence_parallel", default=1)
        shard = self._get(self.config_init, "shard_weights", default=False)
        parts = self._get(self.config_init, "sharded_checkpoints", default=False)
        if size == 1 and not shard and not parts:
            return None
        named = self._get(self.config_init, "trainer.strategy", default="auto")
        if named != "auto":
            raise SettingsError(
                "trainer.strategy must be auto where sequence_parallel, shard_weights or "
                "sharded_checkpoints is set, "
                f"got {named if isinstance(named, str) else type(named).__name__}"
            )
        return SequenceParallelStrategy(size, shard=shard, sharded_checkpoints=parts)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        strategy = self.strategy()
        if strategy is not None:
            kwargs["strategy"] = strategy
        return super().instantiate_trainer(**kwargs)


class RecipeCLI(SharingCLI):
    """The data's tokenizer is the model's; a progress bar that suits where the output goes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.add_sharing(parser)
        parser.link_arguments("data.tokenizer", "model.init_args.tokenizer", apply_on="instantiate")
        parser.set_defaults({"seed_everything": 0})

    def before_validate(self) -> None:
        self.need("validation")

    def before_test(self) -> None:
        self.need("test")

    def before_predict(self) -> None:
        if self.datamodule.test is None:
            self.need("validation")

    def after_predict(self) -> None:
        """Print what was predicted, a line of JSON for each sample."""
        for answers in self.trainer.predict_loop.predictions:
            for answer in answers:
                print(json.dumps(answer, ensure_ascii=False))

    def need(self, split: str) -> None:
        """Refuses to go on without the data of a split.

        Raises:
            SettingsError: there is none.
        """
        if getattr(self.datamodule, split) is None:
            raise SettingsError(f"data.{split} must be given, got None")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        if self._get(self.config_init, "trainer.enable_progress_bar") is not False:
            # What is passed here replaces the callbacks of the config, so they are passed on.
            given = self._get(self.config_init, "trainer.callbacks") or []
            kwargs["callbacks"] = [*given, *(kwargs.get("callbacks") or []), progress_bar()]
        return super().instantiate_trainer(**kwargs)


def main(args: Any = None, run: bool = True) -> RecipeCLI:
    """Parse `args` (the command line if None) and, if `run`, do what they say."""
    return run_cli(RecipeCLI, SampleData, args, run)


def run_cli(cli: type[C], data: type[L.LightningDataModule], args: Any, run: bool) -> C:
    """A command line for any model of a YAML, and for data of one class."""
    return cli(
        L.LightningModule,
        data,
        subclass_mode_model=True,
        args=args,
        run=run,
        save_config_kwargs={"overwrite": True},
    )


if __name__ == "__main__":
    program(main)
