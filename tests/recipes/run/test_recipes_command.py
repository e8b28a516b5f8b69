"""`mm-sparse recipes`: what ships is listed, copied and run, and so is a recipe of one's own."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("jsonargparse")
from mm_sparse.recipes.run import lightning_cli, recipes_command

OWN_MODEL = '''
import lightning as L
import torch


class Echo(L.LightningModule):
    """Predicts the next id from the last, with nothing of the package."""

    def __init__(self, tokenizer, width: int = 4) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(tokenizer.size, width)
        self.head = torch.nn.Linear(width, tokenizer.size)

    def training_step(self, batch, index):
        ids = batch["input_ids"].clamp(max=self.head.out_features - 1)
        logits = self.head(self.table(ids[:, :-1]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
'''
QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes"])


def class_paths(record: Any) -> set[str]:
    """Every `class_path` of a YAML record, at any depth, and a tokenizer's name."""
    if isinstance(record, list):
        return set().union(*map(class_paths, record)) if record else set()
    if not isinstance(record, dict):
        return set()
    own = {record["class_path"]} if isinstance(record.get("class_path"), str) else set()
    if isinstance(record.get("tokenizer"), str):
        own.add(record["tokenizer"])
    return own.union(*map(class_paths, record.values()))


@pytest.mark.parametrize("name", recipes_command.names())
def test_every_class_that_a_recipe_names_exists(name: str) -> None:
    record = yaml.safe_load(recipes_command.path_of(name).read_text())
    for path in class_paths(record):
        module, _, cls = path.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), cls), type), path


def test_recipes_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    recipes_command.main(["ls"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(recipes_command.names()) == 21
    assert any(line.startswith("vlm/digits") and "Hardware:" in line for line in lines)


def test_a_recipe_is_copied_and_not_over_another_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mine.yaml"
    recipes_command.main(["cp", "vlm/digits", str(target)])
    assert target.read_text() == recipes_command.path_of("vlm/digits").read_text()
    with pytest.raises(SystemExit):
        recipes_command.main(["cp", "vlm/digits", str(target)])
    assert f"{target} exists" in capsys.readouterr().err


def test_an_unknown_recipe_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipes_command.main(["run", "vlm/digit"])
    assert "name must be a file or one of distill/checkpoint" in capsys.readouterr().err


def test_programs_of_recipes() -> None:
    programs = {name: recipes_command.program_of(recipes_command.path_of(name)) for name in (
        "vlm/digits", "omni/stamps", *recipes_command.PROGRAMS
    )}  # fmt: skip
    assert programs.pop("vlm/digits") == programs.pop("omni/stamps")
    assert programs == recipes_command.PROGRAMS


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_ones_own_is_run_from_a_file_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_models.py").write_text(OWN_MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    record = yaml.safe_load(recipes_command.path_of("vlm/digits").read_text())
    record["model"] = {"class_path": "own_models.Echo", "init_args": {"width": 3}}
    record["trainer"] = {"max_steps": 2, "default_root_dir": str(tmp_path)}
    record["data"]["batch_size"] = 2
    file = tmp_path / "anything at all.yaml"
    file.write_text(yaml.safe_dump(record))
    monkeypatch.chdir(tmp_path)
    recipes_command.main(["run", str(file), "--data.validation=null", *QUIET])
    cli = lightning_cli.main([f"--config={file}", "--data.validation=null", *QUIET], run=False)
    assert type(cli.model).__name__ == "Echo"
    assert cli.model.head.in_features == 3


def test_a_model_without_images_and_audio_is_refused() -> None:
    from mm_sparse.recipes.datasets.digits import DigitTokenizer
    from mm_sparse.recipes.models import MultimodalLM

    with pytest.raises(ValueError, match="vision or audio must be given, got neither"):
        MultimodalLM(DigitTokenizer())


def test_an_error_of_training_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(args: Any) -> None:
        raise ValueError("in the third step")

    monkeypatch.setattr(lightning_cli, "main", failing)
    with pytest.raises(ValueError, match="in the third step"):
        recipes_command.main(["run", "vlm/digits"])


def test_join_wants_a_checkpoint_in_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "last.ckpt"
    file.touch()
    with pytest.raises(SystemExit):
        recipes_command.main(["join", str(file), str(tmp_path / "whole.ckpt")])
    said = capsys.readouterr().err
    assert f"checkpoint must be a folder of sharded_checkpoints, got '{file}'" in said
    assert not (tmp_path / "whole.ckpt").exists()
