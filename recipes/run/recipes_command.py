"""`mm-sparse recipes`: list, copy and run the recipes that ship, also from an installed wheel."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"
SUBCOMMANDS = ("fit", "validate", "test", "predict")
PROGRAMS = {
    "distill/checkpoint": "mm_sparse.recipes.distillation.distill_command",
    "distill/smollm2": "mm_sparse.recipes.distillation.language",
    "distill/vit": "mm_sparse.recipes.distillation.towers",
    "distill/whisper": "mm_sparse.recipes.distillation.towers",
    "finetune/qwen2_5_vl_7b": "mm_sparse.recipes.run.finetune_checkpoint",
    "finetune/qwen2_5_vl_7b_long": "mm_sparse.recipes.run.finetune_checkpoint",
    "finetune/qwen2_audio": "mm_sparse.recipes.run.finetune_checkpoint",
    "finetune/smollm2": "mm_sparse.recipes.run.finetune_language",
    "finetune/smolvlm": "mm_sparse.recipes.run.finetune_checkpoint",
    "finetune/voxtral": "mm_sparse.recipes.run.finetune_checkpoint",
}
"""Programs of recipes that are no towers and language models put together."""

PLAIN = ("mm_sparse.recipes.distillation.distill_command",)
"""Programs without subcommands."""


def names() -> list[str]:
    """Recipes that ship, "vlm/digits" for one."""
    files = CONFIGS.glob("*/*.yaml")
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in files)


def path_of(name: str) -> Path:
    """File of a recipe by its name, or of a YAML file by its path.

    Raises:
        ValueError: there is no such recipe and no such file.
    """
    shipped = CONFIGS / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        raise ValueError(f"name must be a file or one of {', '.join(names())}, got {name!r}")
    return path


def about(name: str) -> str:
    """What the head of a recipe says of its hardware and metric, in one line."""
    lines = path_of(name).read_text(encoding="utf-8").splitlines()
    head = [line.lstrip("# ") for line in lines[1:12] if line.startswith("#")]
    return next((line for line in head if line.startswith("Hardware:")), head[0] if head else "")


def program_of(path: Path) -> str:
    """Module that runs a recipe: the first line of a shipped one names it."""
    first = path.read_text(encoding="utf-8").splitlines()[0].split()
    named = first[first.index("-m") + 1] if "-m" in first[:-1] else ""
    return named if named in PROGRAMS.values() else "mm_sparse.recipes.run.lightning_cli"


def run(name: str, options: Sequence[str]) -> None:
    """Run a recipe: `fit` unless the options begin with another subcommand of LightningCLI."""
    import sys
    from importlib import import_module

    path = path_of(name)
    given, own = list(options), program_of(path)
    start = [] if own in PLAIN else ["fit"]
    if start and given and given[0] in SUBCOMMANDS:
        start = [given.pop(0)]
    module = import_module(own)
    # LightningCLI warns of a command line beside the arguments that it is given.
    sys.argv = sys.argv[:1]
    from mm_sparse.recipes.run.settings_cli import program

    program(lambda: module.main([*start, f"--config={path}", *given]))


def export_checkpoint(checkpoint: str, folder: Path, config: str | None = None) -> Path:
    """Write the language model of a checkpoint, with scorers and adapter beside it.

    Raises:
        ValueError: the checkpoint is none of a recipe, or `folder` holds files.
    """
    import yaml

    from mm_sparse.recipes.models import from_checkpoint, recipe_of

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {str(folder)!r}")
    text = None if config is None else path_of(config).read_text(encoding="utf-8")
    recipe = None if text is None else recipe_of(yaml.safe_load(text))
    from_checkpoint(checkpoint, recipe).export(folder)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """List, copy and run recipes."""
    parser = argparse.ArgumentParser(prog="mm-sparse recipes", description=__doc__)
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="ls | cp | run | export | join"
    )
    verbs.add_parser("ls", help="list the recipes that ship")
    copy = verbs.add_parser("cp", help="copy a recipe, to change it")
    copy.add_argument("name", help="as `ls` lists it")
    copy.add_argument("file", nargs="?", type=Path, help="where to; ./NAME.yaml if not given")
    start = verbs.add_parser("run", help="run a recipe or a YAML file of your own")
    start.add_argument("name", help="as `ls` lists it, or a file")
    start.add_argument(
        "options", nargs=argparse.REMAINDER, help="[fit] and options of LightningCLI"
    )
    export = verbs.add_parser("export", help="the language model of a checkpoint for transformers")
    export.add_argument("checkpoint", help="of a recipe, runs/digits/checkpoints/last.ckpt for one")
    export.add_argument("folder", type=Path, help="gets the model, its scorers and its adapter")
    export.add_argument("--config", help="recipe of a checkpoint that does not hold its own")
    join = verbs.add_parser("join", help="one file of a checkpoint that is a folder of parts")
    join.add_argument("checkpoint", type=Path, help="of --sharded_checkpoints true")
    join.add_argument("file", type=Path, help="gets what one process would have written")
    args = parser.parse_args(argv)
    try:
        if args.verb == "ls":
            width = max(map(len, names()))
            print("\n".join(f"{name:{width}}  {about(name)}" for name in names()))
        elif args.verb == "cp":
            source = path_of(args.name)
            target = args.file or Path(source.name)
            if target.exists():
                parser.error(f"argument file: {target} exists, name another")
            shutil.copyfile(source, target)
            print(target)
        elif args.verb == "export":
            print(export_checkpoint(args.checkpoint, args.folder, args.config))
        elif args.verb == "join":
            from mm_sparse.recipes.training import join_checkpoint

            join_checkpoint(args.checkpoint, args.file)
            print(args.file)
        else:
            path_of(args.name)
    except ValueError as error:
        parser.error(str(error))
    if args.verb == "run":
        # Outside: errors of training keep their traceback.
        run(args.name, args.options)


if __name__ == "__main__":
    main()
