"""A way out of a recipe: checkpoints become models again, and language models of transformers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("jsonargparse")
from transformers import AutoModelForCausalLM

import mm_sparse as mms
from mm_sparse.recipes.models import MultimodalLM
from mm_sparse.recipes.models.language import LanguageConfig, LoraConfig
from mm_sparse.recipes.run import lightning_cli, recipes_command
from mm_sparse.recipes.run.finetune_language import FinetuneLM
from tests.recipes.models.test_vlm import SPARSE, TINY_LM, model

DIGITS = Path(__file__).resolve().parents[3] / "recipes" / "configs" / "vlm" / "digits.yaml"
IDS = torch.arange(96).view(1, -1) % 10


def logits(language: Any) -> torch.Tensor:
    with torch.no_grad():
        return language.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["whole", "adapter"])
@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_an_exported_model_says_the_same(sparse: Any, lora: Any, tmp_path: Path) -> None:
    made = model(sparse, lora=lora)
    for name, value in made.language.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    for value in made.scorers.parameters():
        torch.nn.init.normal_(value)
    made.export(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "scorers").is_dir() == (sparse is not None)
    if sparse is not None:
        mms.load_scorers(again, tmp_path / "scorers")
    if lora is not None:
        from peft import PeftModel

        again = PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), logits(made.language), rtol=1e-5, atol=1e-5)


def test_a_model_that_learned_on_text_is_exported(tmp_path: Path) -> None:
    LanguageConfig(options=TINY_LM).build(64).save_pretrained(tmp_path / "start")
    made = FinetuneLM(LanguageConfig(path=str(tmp_path / "start")), sparse=SPARSE)
    made.export(tmp_path / "end")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    mms.load_scorers(again, tmp_path / "end" / "scorers")
    torch.testing.assert_close(logits(again), logits(made.language))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", ["recipe"])
    options = [
        f"--config={DIGITS}", "--trainer.max_steps=2", "--data.batch_size=2",
        "--data.validation.init_args.length=2", "--model.vision.weights=null",
        "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
        "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.dirpath={tmp_path}", "--trainer.callbacks.save_last=true",
    ]  # fmt: skip
    lightning_cli.main(["fit", *options])
    return tmp_path / "last.ckpt"


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_becomes_a_model_an_export_and_answers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MultimodalLM.load_from_checkpoint(checkpoint)
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(made.state_dict()[name], value) for name, value in stored.items())
    folder = tmp_path / "exported"
    recipes_command.main(["export", str(checkpoint), str(folder)])
    again: Any = AutoModelForCausalLM.from_pretrained(folder)
    mms.load_scorers(again, folder / "scorers")
    torch.testing.assert_close(logits(again), logits(made.language))
    with pytest.raises(SystemExit):
        recipes_command.main(["export", str(checkpoint), str(folder)])
    assert "folder must be new or empty" in capsys.readouterr().err
    recipes_command.main([
        "run", "vlm/digits", "predict", f"--ckpt_path={checkpoint}", "--trainer.logger=false",
        "--data.validation.init_args.length=2", "--model.vision.weights=null",
        "--model.max_new_tokens=2", "--trainer.accelerator=cpu", "--trainer.callbacks=null",
        "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}",
    ])  # fmt: skip
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert len(lines) == 2
    assert set(json.loads(lines[0])) == {"said", "wanted"}


def test_a_checkpoint_without_a_recipe_asks_for_it(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint must be of a recipe .* give the config"):
        MultimodalLM.load_from_checkpoint(tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint must be a file, .* got 'no', which is none"):
        MultimodalLM.load_from_checkpoint("no")
