"""Checkpoints as people have them learn on, are resumed, exported, and loaded by transformers."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

import mm_sparse as mms
from mm_sparse.recipes.data import Messages
from mm_sparse.recipes.data.speech_manifests import Manifest
from mm_sparse.recipes.finetuning import ChatCollator, ChatData, CheckpointModel
from mm_sparse.recipes.models import LoraConfig
from mm_sparse.recipes.training import Objectives, OptimizerConfig
from tests.support.tiny_checkpoints import write_checkpoint, write_pictures, write_tones

SPARSE = mms.SparseConfig(
    ratio=0.3, tile=64, unit=16, sinks=0, window=16, dense_below=0, bidirectional=()
)
FAST = {"optimizer": OptimizerConfig(lr=5e-3, warmup=2), "max_new_tokens": 4}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Messages:
    return Messages(write_pictures(tmp_path_factory.mktemp("pictures"), words=12))


def train(module: CheckpointModel, data: ChatData, steps: int, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        # A resumed run tells of the state of its loader.
        warnings.simplefilter("ignore", UserWarning)
        trainer.fit(module, data, **options)
    return trainer


def moved(module: CheckpointModel, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def copies(module: CheckpointModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_a_frozen_tower_is_not_differentiated(folder: str, pictures: Messages) -> None:
    module = CheckpointModel(folder, lora=LoraConfig(rank=2), checkpointing=True)
    found: list[Any] = []
    module.base.model.visual.blocks[0].register_forward_hook(
        lambda _, given, out: found.append(out)
    )
    batch = ChatCollator(module.processor, prompts=True)([pictures[0]])
    module.loss(batch).backward()
    assert len(found) == 1
    assert not found[0].requires_grad


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name not in ("prompts", "answers")}
    return model.eval()(**inputs, use_cache=False).logits


def test_it_learns_what_a_dense_model_can_say(folder: str, pictures: Messages) -> None:
    torch.manual_seed(0)
    module = CheckpointModel(folder, **FAST)
    data = ChatData(folder, pictures, validation=pictures, batch_size=3)
    trainer = train(module, data, 24)
    found = trainer.logged_metrics
    assert found["validation/loss"] < 1.5
    assert found["validation/token_f1"] >= found["validation/exact_match"] > 0.3


@pytest.mark.parametrize(
    ("lora", "pack"),
    [(None, False), (None, True), (LoraConfig(rank=2), True)],
    ids=["whole", "packed", "adapters"],
)
def test_a_sparse_model_goes_all_the_way(
    folder: str, pictures: Messages, lora: Any, pack: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)

    def make() -> CheckpointModel:
        goals = Objectives(language=1.0, scorers=0.5, scorers_every=2)
        return CheckpointModel(
            folder, SPARSE, objectives=goals, lora=lora, pack=pack, checkpointing=True, **FAST
        )

    data = ChatData(folder, pictures, validation=pictures, batch_size=3)
    module = make()
    before = copies(module)
    trainer = train(module, data, 4)
    assert trainer.logged_metrics["train/scorer_kl"] > 0
    changed = moved(module, before)
    assert any(name.startswith("scorers.") for name in changed)
    if lora is not None:
        assert all("lora_" in name or name.startswith("scorers.") for name in changed)
    trainer.save_checkpoint(tmp_path / "half.ckpt")

    train(module, data, 4)
    resumed = make()
    trainer = train(resumed, data, 6, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert trainer.global_step == 6
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    stored = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    if lora is not None:
        assert all("lora_" in name or name.startswith("scorers.") for name in stored)
    again = CheckpointModel.load_from_checkpoint(tmp_path / "end.ckpt")
    for one, other in zip(again.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)

    again.export(tmp_path / "exported")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported")
    mms.load_scorers(plain, tmp_path / "exported" / "scorers")
    processor = AutoProcessor.from_pretrained(tmp_path / "exported")
    batch = ChatCollator(processor, prompts=True)([pictures[0], pictures[1]])
    torch.testing.assert_close(
        logits(plain, batch), logits(again.model, batch), rtol=1e-4, atol=1e-4
    )
    ids = plain.generate(**batch["prompts"], max_new_tokens=4, do_sample=False)
    assert len(ids) == len(again.generate(batch["prompts"])) == 2


def test_an_unbroken_run_and_a_resumed_one_are_the_same(
    folder: str, pictures: Messages, tmp_path: Path
) -> None:
    def run(steps: int, **options: Any) -> tuple[CheckpointModel, L.Trainer]:
        torch.manual_seed(0)
        module = CheckpointModel(
            folder, SPARSE, objectives=Objectives(1.0, 0.5), optimizer=OptimizerConfig(
                lr=1e-3, warmup=0, final=1.0
            ),
        )  # fmt: skip
        return module, train(module, ChatData(folder, pictures, batch_size=2), steps, **options)

    _, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(5, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    unbroken, _ = run(5)
    for one, other in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_scorers_learn_alone_and_then_the_sparse_model(
    folder: str, pictures: Messages, tmp_path: Path
) -> None:
    out = str(tmp_path / "first")
    goals = Objectives(language=0.0, scorers=1.0)
    module = CheckpointModel(folder, SPARSE, objectives=goals, out=out, **FAST)
    before = copies(module)
    data = ChatData(folder, pictures, batch_size=3)
    trainer = train(module, data, 3)
    assert trainer.logged_metrics["train/scorer_kl"] > 0
    changed = moved(module, before)
    assert changed
    assert all(name.startswith("scorers.") for name in changed)
    second = CheckpointModel(
        folder, scorers_from=f"{out}/scorers", lora=LoraConfig(rank=2), freeze=("model.visual",),
        out=str(tmp_path / "second"), **FAST,
    )  # fmt: skip
    assert mms.sparse_config(second.base) == SPARSE
    for one, other in zip(second.scorers.parameters(), module.scorers.parameters(), strict=True):
        assert torch.equal(one, other)
    train(second, data, 2)
    assert (tmp_path / "second" / "scorers").is_dir()


def test_conversations_too_short_to_run_sparse_teach_nothing(
    folder: str, pictures: Messages, caplog: pytest.LogCaptureFixture
) -> None:
    config = mms.SparseConfig(dense_below=4096, bidirectional=())
    module = CheckpointModel(folder, config, objectives=Objectives(0.0, 1.0), **FAST)
    before = copies(module)
    train(module, ChatData(folder, pictures), 2)
    assert not moved(module, before)
    assert caplog.text.count("no scorer learned in step 0") == 1


def test_batches_of_conversations_that_are_too_long_teach_nothing(
    folder: str, pictures: Messages
) -> None:
    module = CheckpointModel(folder, optimizer=OptimizerConfig(weight_decay=0.0))
    before = copies(module)
    train(module, ChatData(folder, pictures, validation=pictures, max_length=5), 2)
    assert not moved(module, before)


def test_an_adapter_is_exported_for_peft(folder: str, pictures: Messages, tmp_path: Path) -> None:
    from peft import PeftModel

    module = CheckpointModel(folder, SPARSE, lora=LoraConfig(rank=2), **FAST)
    for name, value in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    module.export(tmp_path, merge=False)
    assert not (tmp_path / "model.safetensors").exists()
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    mms.load_scorers(model, tmp_path / "scorers")
    again = PeftModel.from_pretrained(model, str(tmp_path))
    batch = ChatCollator(module.processor)([pictures[0]])
    torch.testing.assert_close(logits(again, batch), logits(module.model, batch))


@pytest.mark.filterwarnings("ignore:.*counts as text")  # The queries of Granite's projector.
@pytest.mark.parametrize("kind", ["qwen2_audio", "granite_speech", "voxtral"])
def test_a_speech_model_goes_all_the_way(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Voxtral's tokenizer has no template to mark.
    folder = write_checkpoint(tmp_path / "checkpoint", kind, marked=kind != "voxtral")
    tones = Manifest(write_tones(tmp_path))
    data = ChatData(folder, tones, validation=tones, batch_size=2)
    goals = Objectives(language=1.0, scorers=0.5)
    module = CheckpointModel(
        folder, SPARSE, objectives=goals, pack=True, strict=kind != "granite_speech", **FAST
    )
    trainer = train(module, data, 12)
    found = trainer.logged_metrics
    assert found["validation/loss"] < 4
    assert "validation/token_f1" in found
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = CheckpointModel.load_from_checkpoint(tmp_path / "end.ckpt")
    said = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    ).predict(again, data)
    assert [answer["wanted"] for batch in said for answer in batch] == ["low", "high"] * 2
    again.export(tmp_path / "exported")
    plain = AutoModelForMultimodalLM.from_pretrained(tmp_path / "exported")
    if kind == "granite_speech":
        mms.sparsify(plain, SPARSE, strict=False)
    mms.load_scorers(plain, tmp_path / "exported" / "scorers")
    batch = ChatCollator(AutoProcessor.from_pretrained(tmp_path / "exported"))([tones[0], tones[1]])
    torch.testing.assert_close(logits(plain, batch), logits(again.model, batch))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objectives": Objectives(1.0, 0.1)}, "objectives.scorers must be 0 unless"),
        ({"load_in_4bit": True}, "lora must be given with load_in_4bit, got None"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"dtype": "float7"}, "dtype must be 'auto' or a dtype of torch, got 'float7'"),
        ({"freeze": ("model.eyes",)}, "freeze must name submodules .*model.visual.*'model.eyes'"),
        ({"lora": LoraConfig(modules=("query",))}, "lora.modules must name layers"),
        ({"lora": LoraConfig(), "sparse": SPARSE, "objectives": Objectives(0.0, 1.0)},
         "lora must be None where objectives.language is 0"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(folder: str, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointModel(folder, **given)


def test_4_bits_without_bitsandbytes_name_the_extra(folder: str, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "mm-sparse\[quantize\]"'):
        CheckpointModel(folder, lora=LoraConfig(), load_in_4bit=True)


def test_adapters_learn_on_weights_of_4_bits(
    folder: str, pictures: Messages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    # Some CPUs get another packing in eval mode, from which nothing learns any more.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    goals = Objectives(language=1.0, scorers=0.5)
    module = CheckpointModel(
        folder, SPARSE, objectives=goals, lora=LoraConfig(rank=2), load_in_4bit=True,
        checkpointing=True, **FAST,
    )  # fmt: skip
    assert any(isinstance(x, modules.Linear4bit) for x in module.modules())
    data = ChatData(folder, pictures, validation=pictures, batch_size=3)
    before = copies(module)
    trainer = train(module, data, 4)
    assert all("lora_" in name or name.startswith("scorers.") for name in moved(module, before))
    assert moved(module, before)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = CheckpointModel.load_from_checkpoint(tmp_path / "half.ckpt")
    assert train(again, data, 6, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    again.export(tmp_path / "exported", merge=False)
    assert (tmp_path / "exported" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="merge must be false"):
        again.export(tmp_path / "merged")


def test_folders_without_a_model_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="folder must hold a processor, got"):
        CheckpointModel(str(tmp_path))


def test_a_checkpoint_of_other_settings_is_refused(
    folder: str, pictures: Messages, tmp_path: Path
) -> None:
    module = CheckpointModel(folder, **FAST)
    train(module, ChatData(folder, pictures), 1).save_checkpoint(tmp_path / "dense.ckpt")
    sparse = CheckpointModel(folder, SPARSE, **FAST)
    with pytest.raises(ValueError, match="checkpoint must be of a run with the same settings"):
        sparse.read_weights(str(tmp_path / "dense.ckpt"))
