"""The loss over answers alone is the loss that the model computes from all its logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.smolvlm import processing_smolvlm

from mm_sparse.recipes.data import Messages
from mm_sparse.recipes.data.speech_manifests import Manifest
from mm_sparse.recipes.finetuning import ChatCollator, CheckpointModel
from mm_sparse.recipes.models import LoraConfig
from tests.support.tiny_checkpoints import write_checkpoint, write_pictures, write_tones

FAMILIES = ("qwen2_5_vl", "smolvlm", "qwen2_audio", "granite_speech", "voxtral")


def batch_of(module: CheckpointModel, family: str, path: Path) -> dict[str, Any]:
    path.mkdir()
    if family in ("qwen2_audio", "granite_speech", "voxtral"):
        samples: Any = Manifest(write_tones(path))
    else:
        samples = Messages(write_pictures(path, words=12))
    return ChatCollator(module.processor, prompts=True)([samples[0], samples[1]])


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(
    family: str, pack: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "smolvlm":
        monkeypatch.setattr(processing_smolvlm, "num2words", str)
    torch.manual_seed(0)
    module = CheckpointModel(write_checkpoint(tmp_path, family), pack=pack)
    batch = batch_of(module, family, tmp_path / "data")
    shapes: list[torch.Size] = []
    head = module.base.get_output_embeddings()
    head.register_forward_hook(lambda _, given, out: shapes.append(out.shape))
    found: list[tuple[Any, ...]] = []
    for make in (lambda: module(batch).loss, lambda: module.loss(batch)):
        module.zero_grad()
        # One of the families drops out.
        torch.manual_seed(1)
        loss = make()
        loss.backward()
        found.append((loss, *(p.grad for p in module.parameters() if p.grad is not None)))
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    assert shapes[1][1] < shapes[0][1]
    assert "_loss_function" not in module.base.__dict__


def test_a_loss_function_of_the_user_stays(tmp_path: Path) -> None:
    module = CheckpointModel(write_checkpoint(tmp_path, "qwen2_5_vl"))
    batch = batch_of(module, "qwen2_5_vl", tmp_path / "data")
    own = module.base.loss_function

    def double(*given: Any, **options: Any) -> torch.Tensor:
        return 2 * own(*given, **options)

    once = module.loss(batch)
    module.base.loss_function = double
    torch.testing.assert_close(module.loss(batch), 2 * once)
    assert module.base.loss_function is double


def test_no_answer_gives_what_the_model_gives(tmp_path: Path) -> None:
    module = CheckpointModel(write_checkpoint(tmp_path, "qwen2_5_vl"))
    batch = batch_of(module, "qwen2_5_vl", tmp_path / "data")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert torch.equal(module.loss(batch).isnan(), module(batch).loss.isnan())


def test_adapters_are_wide_and_computed_narrow(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = write_checkpoint(tmp_path, "qwen2_5_vl")
    module = CheckpointModel(folder, lora=LoraConfig(rank=2), dtype="bfloat16")
    batch = batch_of(module, "qwen2_5_vl", tmp_path / "data")
    parts = {n: m for n, m in module.model.named_modules() if n.endswith(("lora_A.default",
             "lora_B.default"))}  # fmt: skip
    seen: list[torch.dtype] = []
    for part in parts.values():
        part.register_forward_hook(lambda _, given, out: seen.append(out.dtype))
    module.loss(batch).backward()
    assert set(seen) == {torch.bfloat16}
    for part in parts.values():
        assert part.weight.dtype == torch.float32
        assert part.weight.grad is not None
        assert part.weight.grad.dtype == torch.float32
