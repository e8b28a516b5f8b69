"""The page on supported models is what the program makes of its JSON, and the program runs."""

import json

import pytest

from tests.tools import families

RECORD = json.loads(families.DATA.read_text(encoding="utf-8"))
ROWS = {(row["source"], row["name"]): row for row in RECORD["rows"]}
FAULTS = ("late", "wrong", "crash")
# They were wrong, or refused late, once.
MENDED = {
    "git": "partly",
    "moonshine": "served",
    "doge": "refused",
    "t5gemma2": "partly",
    "paligemma": "served",
}
FAMILIES = (
    "llama", "gemma3", "gpt2", "deepseek_v3", "qwen2_5_vl", "bert", "t5", "whisper", "vit",
    "wav2vec2", "clip", "mamba",
)  # fmt: skip


def test_the_page_is_written_from_the_json():
    assert families.PAGE.read_text(encoding="utf-8") == families.page(RECORD)


def test_nothing_is_wrong():
    assert not {name for name, row in ROWS.items() if row["verdict"] in FAULTS}


def test_every_kind_has_a_table():
    assert {row["kind"] for row in RECORD["rows"]} <= set(families.KINDS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MENDED)
def test_families_that_were_wrong(name):
    pytest.importorskip("transformers")
    row = families.try_type(name)
    assert row.verdict == MENDED[name], row.words


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    pytest.importorskip("transformers")
    row = families.try_type(name)
    assert row.verdict == ROWS["transformers", name]["verdict"], row.words


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "verdict"),
    [("twins_svt_small", "partly"), ("swin_tiny_patch4_window7_224", "refused")],
)
def test_towers(name, verdict):
    pytest.importorskip("timm")
    row = families.try_tower("timm", name)
    assert row.verdict == verdict, row.words
