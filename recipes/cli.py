"""`python -m mm_sparse.recipes.vlm fit --config FILE.yaml`: LightningCLI on model and data."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mm_sparse.recipes.callbacks import progress_bar
from mm_sparse.recipes.data import SampleData
from mm_sparse.recipes.vlm import VLM


class RecipeCLI(LightningCLI):
    """The data's tokenizer is the model's; a progress bar that suits where the output goes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.tokenizer", "model.tokenizer", apply_on="instantiate")
        parser.set_defaults({"seed_everything": 0})

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        if self._get(self.config_init, "trainer.enable_progress_bar") is not False:
            # What is passed here replaces the callbacks of the config, so they are passed on.
            given = self._get(self.config_init, "trainer.callbacks") or []
            kwargs["callbacks"] = [*given, *(kwargs.get("callbacks") or []), progress_bar()]
        return super().instantiate_trainer(**kwargs)


def main(args: Any = None, run: bool = True) -> RecipeCLI:
    """Parse `args` (the command line if None) and, if `run`, do what they say."""
    return RecipeCLI(
        VLM,
        SampleData,
        args=args,
        run=run,
        save_config_kwargs={"overwrite": True},
    )
