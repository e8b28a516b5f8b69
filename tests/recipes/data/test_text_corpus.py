"""Texts from files: what is read, how they are parted, which windows are drawn."""

import json
from pathlib import Path

import numpy as np
import pytest

from mm_sparse.recipes.data import text_corpus
from mm_sparse.recipes.data.text_corpus import CorpusData
from tests.support.tiny_recipes import write_corpus


@pytest.fixture
def npz(tmp_path: Path) -> str:
    return write_corpus(tmp_path)


class Letters:
    """A tokenizer of single characters."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return [1 + ord(c) % 30 for c in text]


def test_a_corpus_parts_files_and_reads_what_people_have(tmp_path: Path) -> None:
    import gzip

    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text number {i} " * 700)
    with gzip.open(tmp_path / "x.gz", "wt") as stream:
        stream.write("packed " * 2000)
    page = tmp_path / "page.html"
    page.write_text("<p>Seen &amp; kept</p><script>no</script>")
    assert text_corpus.read_text(page) == "Seen & kept"
    assert text_corpus.read_text(tmp_path / "x.gz").startswith("packed packed")
    patterns = {"text": [str(tmp_path / "*.txt")]}
    arrays, names = text_corpus.build(
        patterns, {}, Letters(), tokens=64, count=2, train_tokens=10**6
    )
    assert arrays["validation/text"].shape == arrays["test/text"].shape == (2, 64)
    used = [n for part in names.values() for n in part]
    assert len(set(used)) == 4
    assert all(
        text_corpus.file_split(Path(n)) == p.split("/")[0] for p, ns in names.items() for n in ns
    )
    trained = sum(text_corpus.file_split(p) == "train" for p in tmp_path.glob("*.txt"))
    assert (arrays["train"] == 0).sum() == trained
    kept = {"text": [str(tmp_path / "1*.txt")]}
    _, names = text_corpus.build(patterns, kept, Letters(), tokens=64, count=20)
    assert {Path(n).name[0] for n in names["test/text"]} == {"1"}
    with pytest.raises(ValueError, match="text must have a validation file of 99999 tokens"):
        text_corpus.build(patterns, {}, Letters(), tokens=99999)


def test_windows_are_the_same_for_the_same_seed(npz: str) -> None:
    data = CorpusData(npz, 100, length=5)
    first, again = ([x.tolist() for x in data.train_dataloader()] for _ in range(2))
    assert first == again
    assert len({json.dumps(x) for x in first}) > 1
    with pytest.raises(ValueError, match=r"path must be a file of .*text_corpus, got 'no.npz'"):
        CorpusData("no.npz")
    with pytest.raises(ValueError, match="row must have more than 10 tokens, got 3"):
        text_corpus.Windows(np.zeros(3), 10, 1)
