"""A sample of a recipe for `mm-sparse inspect`."""

from __future__ import annotations

import argparse

from mm_sparse.analysis import InspectionSample
from mm_sparse.recipes.run.inspection import inspection_sample
from mm_sparse.recipes.run.sparse_vs_dense import prepare, validation_of


def recipe(arguments: list[str]) -> InspectionSample:
    """The sample of a recipe's config file; further options are those of the recipe."""
    parser = argparse.ArgumentParser(prog="inspect_recipe:recipe")
    parser.add_argument("--config", required=True)
    parser.add_argument("--ckpt", help="checkpoint with the weights; those of the config if absent")
    parser.add_argument("--sample", type=int, default=0, help="number in the validation data")
    options, more = parser.parse_known_args(arguments)
    weights = [] if options.ckpt is None else [f"--model.weights={options.ckpt}"]
    cli = prepare("inspect", options.config, [*weights, *more])
    samples = validation_of(cli, options.config)
    return inspection_sample(cli.model.eval(), cli.datamodule.collator, samples[options.sample])
