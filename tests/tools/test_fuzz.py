"""The fuzzer of kernels finds nothing where there is nothing, and something where there is."""

import json
from pathlib import Path
from typing import Any

import pytest

import mm_sparse as mms
from tests.tools import fuzz


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.argv", ["fuzz", "--seconds", "3", "--device", "cpu", *options])
    return fuzz.main()


def test_it_counts_what_it_covers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, "--most", "100", "--out", str(tmp_path / "found.json")) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failures"] == []
    sizes = sum(count for name, count in found["covered"].items() if name.startswith("G"))
    assert sizes == found["problems"] > 0


@pytest.mark.parametrize("number", [0, 5])
def test_it_finds_a_wrong_kernel(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attend: Any = mms.attend
    monkeypatch.setattr(mms, "attend", lambda *given: 1.05 * attend(*given))
    assert run(monkeypatch, "--most", "100", "--only", str(number)) == 1
    assert f"{number}: out is off by" in capsys.readouterr().out


@pytest.mark.parametrize("number", [123, 559])
def test_weights_of_a_sample_are_those_of_rows_with_fewer_tiles(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "--seed", "99", "--only", str(number)) == 0
