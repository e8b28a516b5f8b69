import json
from pathlib import Path
from typing import Any

import pytest

import mm_sparse as mms
from mm_sparse.bench import estimate_model, estimate_table
from mm_sparse.bench.estimate import _at, _with_few_layers
from mm_sparse.cli import main as cli
from tests.support.hf_models import build

pytest.importorskip("transformers")


def llama(**fields: Any) -> Any:
    config = build("llama").model.config
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def test_lengths_that_did_not_run_follow_a_parabola() -> None:
    def seconds(n: int) -> float:
        return 0.5 + 3e-4 * n + 2e-8 * n * n

    times = {n: seconds(n) for n in (4096, 8192, 16384)}
    assert _at(65536, times) == pytest.approx(seconds(65536), rel=1e-6)
    assert _at(8192, times) == times[8192]


def test_layers_of_every_kind_are_built_and_counted() -> None:
    config = build("gemma3").model.config
    text = config.get_text_config()
    text.num_hidden_layers, text.layer_types = (
        12,
        (["sliding_attention"] * 5 + ["full_attention"]) * 2,
    )
    short, counts = _with_few_layers(config)
    assert counts == {"sliding_attention": 10, "full_attention": 2}
    assert short.get_text_config().num_hidden_layers == 6
    assert short.get_text_config().layer_types == text.layer_types[:6]
    assert text.num_hidden_layers == 12


def test_every_work_is_estimated_and_shown() -> None:
    found = estimate_model(llama(num_hidden_layers=5), 256, sparse=mms.SparseConfig(dense_below=0))
    assert set(found.seconds) == {"prefill", "decode", "train"}
    assert all(x > 0 for row in found.seconds.values() for x in row.values())
    assert found.layers == 5
    assert not any(found.computed.values())
    assert 0 <= found.attention_share < 1
    text = estimate_table(found)
    assert "prefill, s" in text
    assert "decode, ms" in text
    assert found.cache_gib == pytest.approx(5 * 2 * 2 * 8 * 256 * 4 / 2**30)


def test_a_tower_is_timed() -> None:
    config = build("qwen2_5_vl").model.config
    found = estimate_model(config, 64, images=3, works=["prefill"])
    assert found.tower_seconds["dense"] > 0
    assert found.seconds["prefill"]["dense"] > found.tower_seconds["dense"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tokens": 0}, "tokens must be from 1"),
        ({"tokens": 8, "images": -1}, "images from 0"),
        ({"tokens": 8, "works": ["fly"]}, "works must be of"),
    ],
)
def test_what_cannot_be_estimated_is_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        estimate_model(llama(), **options)


def test_a_config_without_a_language_model_is_refused() -> None:
    from transformers import ViTConfig

    with pytest.raises(ValueError, match="config must be of a language model, got ViTConfig"):
        estimate_model(ViTConfig(), 64)


def test_the_command_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "tiny")
    out = tmp_path / "found.json"
    options = ["--tokens", "64", "--works", "prefill", "--out", str(out)]
    assert cli.main(["estimate", str(tmp_path / "tiny"), *options]) == 0
    assert "tiny: 0.00B parameters" in capsys.readouterr().out
    assert json.loads(out.read_text())["tokens"] == 64
    assert cli.main(["estimate", str(tmp_path / "tiny/config.json"), *options]) == 0
    with pytest.raises(SystemExit, match="mm-sparse estimate: "):
        cli.main(["estimate", str(tmp_path / "nothing"), *options])
