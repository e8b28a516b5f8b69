import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mm_sparse.bench import ModelShape, model_bench, model_table, run_models
from mm_sparse.bench.model_shapes import MODEL_SHAPES
from mm_sparse.cli import bench as command
from tests.support.hf_models import build

pytest.importorskip("transformers")


def small_ids(model: Any, count: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 90, (1, count))}


@pytest.mark.parametrize("work", ["prefill", "train", "decode", "answer"])
def test_forms_stand_beside_each_other(work: str) -> None:
    if work == "train":
        pytest.importorskip("peft")
    shape = ModelShape("tiny", "tokens", lambda small: build("llama").model, small_ids)
    forms = ["stock", "sparse-16-0.5", "fast"]
    results = run_models(shape, [300], forms, device="cpu", repeats=1, work=work)
    stock, sparse, wrong = results
    assert stock.seconds
    assert sparse.seconds
    assert wrong.seconds is None
    assert "form must be one of" in wrong.note
    table = model_table(results)
    assert f"stock {stock.seconds / sparse.seconds:.2f}x" in table
    assert "form must be" in table


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_shapes_are_those_of_the_published_models(name: str) -> None:
    with torch.device("meta"):
        model = MODEL_SHAPES[name].build(False)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx(float(name.rsplit("-", 1)[1][:-1]), rel=0.2)
    assert not MODEL_SHAPES[name].tower or model.get_submodule(MODEL_SHAPES[name].tower)


@pytest.mark.slow
def test_the_command_writes_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models.json"
    command.main(["--models", "qwen2.5-vl-7b", "--small", "--out", str(out)])
    records = json.loads(out.read_text())["records"]
    assert [r["form"] for r in records] == ["stock", "sparse-64-0.2", "sparse-16-0.2"]
    assert "stock" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--models", "gpt-5"])
    assert "argument --models: must be of" in capsys.readouterr().err


def test_the_ideal_step_gives_the_logits_of_the_stock_one() -> None:
    from transformers import StaticCache

    torch.manual_seed(0)
    shape = MODEL_SHAPES["llama-3-8b"]
    model: Any = shape.build(True).eval()
    inputs = shape.inputs(model, 70)
    inputs["input_ids"] = inputs["input_ids"].repeat(2, 1)
    found = []
    for form in ("stock", "ideal"):
        with model_bench._in_form(model, form), torch.no_grad():
            model_bench._IDEAL_KEYS[0] = 71
            cache = StaticCache(config=model.config, max_cache_len=90)
            model(**inputs, past_key_values=cache, logits_to_keep=1)
            found.append(model(inputs["input_ids"][:, -1:], past_key_values=cache).logits)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_rows_of_images_cannot_be_repeated() -> None:
    with pytest.raises(ValueError, match="batch must be 1 where inputs are not text alone, got 2"):
        run_models(MODEL_SHAPES["qwen2.5-vl-7b"], [1], ["stock"], batch=2, small=True, device="cpu")
