"""`python -m mm_sparse.recipes.NAME fit --config FILE.yaml`: LightningCLI on model and data."""

import importlib
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mm_sparse.recipes.data import SampleData
from mm_sparse.recipes.run.callbacks import progress_bar

MODELS = {"vlm": "VLM", "speech": "Speech", "omni": "Omni"}
"""Class of the module that has the name of a recipe."""


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


def main(recipe: str, args: Any = None, run: bool = True) -> RecipeCLI:
    """Parse `args` (the command line if None) for a recipe and, if `run`, do what they say."""
    if recipe not in MODELS:
        raise ValueError(f"recipe must be one of {', '.join(MODELS)}, got {recipe!r}")
    # Not by what runs as __main__: its classes would be others than those of the imports.
    module = importlib.import_module(f"mm_sparse.recipes.models.{recipe}")
    return RecipeCLI(
        getattr(module, MODELS[recipe]),
        SampleData,
        args=args,
        run=run,
        save_config_kwargs={"overwrite": True},
    )
