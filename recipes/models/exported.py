"""Models of recipes out of their checkpoints, and language models out of them for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

import mm_sparse as mms
from mm_sparse.integrations import is_sparsified
from mm_sparse.recipes.data import Tokenizer
from mm_sparse.recipes.training import read_rest, whole_tensors

RECIPE = "mm_sparse_recipe"
"""Key of a checkpoint: JSON with the model and the tokenizer of the config of its run."""
ADAPTER = "lora_"


def recipe_of(config: dict[str, Any]) -> dict[str, Any]:
    """What a model is built from, of the config of a recipe."""
    data = config.get("data")
    tokenizer = data.get("tokenizer") if isinstance(data, dict) else None
    return {"model": config.get("model"), "tokenizer": tokenizer}


def from_checkpoint(path: str | Path, recipe: dict[str, Any] | None = None) -> Any:
    """The model of a checkpoint in eval mode, on the CPU.

    Args:
        recipe: of `recipe_of`, for a checkpoint that has none.
    Raises:
        ValueError: there is no such file, or it does not say what it was built from.
    """
    import lightning as L
    from jsonargparse import ArgumentParser

    stored = read_rest(path).get(RECIPE)
    if recipe is None:
        if stored is None:
            raise ValueError(
                f"checkpoint must be of a recipe that was run from a config, got {str(path)!r}, "
                "which holds none: give the config"
            )
        recipe = dict(json.loads(stored))
    parser: Any = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tokenizer", type=Tokenizer)
    parser.add_subclass_arguments(L.LightningModule, "model")
    if recipe.get("tokenizer") is not None:
        parser.link_arguments("tokenizer", "model.init_args.tokenizer", apply_on="instantiate")
    model = parser.instantiate_classes(parser.parse_object(_without_weights(recipe))).model
    model.read_weights(str(path))
    return model.eval()


def _without_weights(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose model reads no weights of other runs: the checkpoint has them all."""
    model = recipe["model"]
    arguments = {k: v for k, v in model.get("init_args", {}).items() if k != "tokenizer"}
    for name in ("vision", "audio"):
        if isinstance(arguments.get(name), dict):
            arguments[name] = {**arguments[name], "weights": None}
    if "weights" in arguments:
        arguments["weights"] = None
    return {**recipe, "model": {**model, "init_args": arguments}}


def export_language(
    language: Any, folder: str | Path, *, lora: Any = None, writes: bool = True
) -> None:
    """Write a language model for `from_pretrained`, its scorers and its adapter beside it.

    Args:
        folder: gets the model; `folder/scorers` what `mms.load_scorers` reads, if it is sparse;
            `folder/adapter` what peft reads, if it has one.
        lora: config of the adapter, as peft has it.
        writes: False for a process that gives its parts of sharded weights alone.
    """
    folder = Path(folder)
    sparse = is_sparsified(language)
    scorers = {id(x) for x in mms.scorers_of(language).parameters()} if sparse else set()
    weights: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    own = [(name, value) for name, value in _tensors(language) if id(value) not in scorers]
    for name, value in whole_tensors(own).items():
        if ADAPTER in name:
            adapter["base_model.model." + name.replace(".default.", ".")] = value.detach()
        else:
            weights[name.replace(".base_layer.", ".")] = value.detach()
    if not writes:
        return
    language.save_pretrained(folder, state_dict=weights)
    if sparse:
        mms.save_scorers(language, folder / "scorers")
    if lora is not None:
        from safetensors.torch import save_file

        place = folder / "adapter"
        lora.save_pretrained(str(place))
        clear = {name: value.contiguous() for name, value in adapter.items()}
        save_file(clear, place / "adapter_model.safetensors", metadata={"format": "pt"})


def _tensors(model: nn.Module) -> Any:
    """What a state dict holds, as parameters."""
    return model.state_dict(keep_vars=True).items()
