"""LightningCLI whose errors are sentences: what is wrong, and what may have been meant.

A wrong setting ends a program with its sentence alone; errors of training keep their traceback.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NoReturn

import jsonargparse  # noqa: F401 lightning goes on without it, and fails later
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from mm_sparse._extras import extra_of
from mm_sparse.recipes.models import recipe_of

MOST_LINES = 4
NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Not a valid subclass",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
    "a dict without",
)


class SettingsError(ValueError):
    """A setting of a recipe is wrong; nothing has run yet."""


class SettingsParser(LightningArgumentParser):
    """Ends with a sentence, without the list of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        subcommand = re.match(r"Subcommand '(\w+)'", message)
        if subcommand and parser is self:
            parser = _subparsers(self).get(subcommand[1], self)
        program = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"{program} --help lists all options.\n")
        sys.stderr.write(f"error: {sentence(message, _options(parser))}\n")
        sys.exit(2)


class LoggedConfig(SaveConfigCallback):
    """Writes the config beside the logs, and gives it to them as hyperparameters."""

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        record = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(record)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if hasattr(pl_module, "recipe"):
            # As plain values: a checkpoint holds it.
            pl_module.recipe = recipe_of(yaml.safe_load(self.parser.dump(self.config)))
        super().setup(trainer, pl_module, stage)


class SettingsCLI(LightningCLI):
    """The command line of a recipe."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("save_config_callback", LoggedConfig)
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        self.parser_class = SettingsParser
        return super().init_parser(**kwargs)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer.

        Raises:
            SettingsError: one of them refuses what it is given, or a file is not there.
        """
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError) as error:
            raise SettingsError(sentence(str(error))) from error


def program(main: Callable[[], Any]) -> None:
    """Run the `main` of a module: a wrong setting or a missing package is one sentence.

    Raises:
        SystemExit: there was one; its code is 2.
    """
    try:
        main()
    except SettingsError as error:
        sys.stderr.write(f"error: {error}\n")
    except ModuleNotFoundError as error:
        said = f"{error}{extra_of(error)}"
        if "mm-sparse[" not in said:
            raise
        sys.stderr.write(f"error: {said}\n")
    else:
        return
    sys.exit(2)


def sentence(message: str, options: Iterable[str] = ()) -> str:
    """What is wrong in a message of jsonargparse, with the nearest known name for an unknown one.

    Args:
        options: names that the command line knows, without dashes.
    """
    unknown = re.match(r"unrecognized arguments: (.*)", message) or re.match(
        r"Subcommand '\w+' does not accept option '([^']+)'", message
    )
    if unknown:
        name = unknown[1].split()[0].lstrip("-").partition("=")[0]
        return f"{name} is no setting{meant(name, options)}"
    keys: list[str] = []
    home, said = "", []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if text.startswith("Given value") and said:
            break
        key = re.match(r'Parser key "([^"]+)":', text)
        place = re.match(r"Problem with given class_path '([^']+)':", text)
        if key and not said:
            keys.append(key[1])
        elif place:
            home = place[1]
        elif text and not text.startswith(NOISE):
            said.append(_plain(text, home))
    where = f"{'.'.join(keys)}: " if keys else ""
    return where + "\n".join(said[:MOST_LINES]) if said else message


def _plain(text: str, home: str) -> str:
    """One complaint in plain words; `home` is the class that it is about."""
    unknown = re.match(r"Option '([^']+)' is not accepted", text)
    if unknown:
        about = f" of {home}" if home else ""
        return f"{unknown[1]} is no argument{about}{meant(unknown[1], _arguments(home))}"
    wanted = re.match(r"Expected a <class '([^']+)'>\. Got value: (.*)", text)
    if wanted:
        return f"must be {wanted[1]}, got {wanted[2]!r}"
    absent = re.match(r"module '([^']+)' has no attribute '([^']+)'", text)
    if absent:
        names = [name for name in dir(import_module(absent[1])) if not name.startswith("_")]
        return f"{absent[1]} has no {absent[2]}{meant(absent[2], names)}"
    return text


def meant(name: str, known: Iterable[str]) -> str:
    """What may have been meant, as the end of a sentence; nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _arguments(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    try:
        return list(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def _options(parser: Any) -> list[str]:
    return [name.lstrip("-") for name in parser._option_string_actions if name.startswith("--")]


def _subparsers(parser: Any) -> dict[str, Any]:
    action = getattr(parser, "_subcommands_action", None)
    return getattr(action, "_name_parser_map", {}) or {}
