"""Long texts from files, tokenised once: training, validation and test parted by file.

    python -m mm_sparse.recipes.data.text_corpus corpus.npz \\
        --kind text '/usr/share/doc/**/*.html' \\
        --kind code '/usr/lib/python3/**/*.py' --test code '/usr/lib/python3.11/**/*.py'

N tokens of a sequence
"""

import argparse
import glob
import gzip
import hashlib
import html
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from mm_sparse.recipes.data.samplers import ResumableLoader, ShardedOrder

CORPUS_SPLITS = ("train", "validation", "test")
MARKUP = re.compile(r"<(script|style)\b.*?</\1>|<[^>]+>", re.S | re.I)


def read_text(path: Path) -> str:
    """A file as text: gz is unpacked, html loses its markup."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    if ".html" in path.suffixes:
        text = html.unescape(MARKUP.sub(" ", text))
        text = re.sub(r"\n\s*\n\s*", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()
    return text


def file_split(path: Path) -> str:
    """Of 20 files 16 train, 2 validate and 2 test, by the checksum of the path."""
    bucket = int(hashlib.sha1(str(path).encode()).hexdigest(), 16) % 20
    return "train" if bucket < 16 else "validation" if bucket < 18 else "test"


def find_files(patterns: Iterable[str], smallest: int = 8000) -> list[Path]:
    """Regular files of at least `smallest` bytes, shuffled the same way every time."""
    paths = {Path(p) for pattern in patterns for p in glob.glob(pattern, recursive=True)}
    files = [p for p in paths if p.is_file() and not p.is_symlink()]
    files = sorted(p for p in files if p.stat().st_size >= smallest or p.suffix == ".gz")
    random.Random(0).shuffle(files)
    return files


def sequences(
    files: Iterable[Path], tokenizer: Any, tokens: int, count: int
) -> tuple[list[list[int]], list[str]]:
    """The first N tokens of the first `count` files that have as many, and the files' names."""
    rows, names = [], []
    for path in files:
        if len(rows) == count:
            break
        text = read_text(path)
        if len(text) < 4 * tokens:
            continue
        ids = tokenizer.encode(text[: 12 * tokens])[:tokens]
        if len(ids) == tokens:
            rows.append(ids)
            names.append(str(path))
    return rows, names


def stream(files: Iterable[Path], tokenizer: Any, most: int) -> Iterator[list[int]]:
    """Tokens of whole files, each with the end of text behind it, up to `most` in all."""
    seen = 0
    for path in files:
        if seen >= most:
            return
        ids = tokenizer.encode(read_text(path)[:400_000])
        seen += len(ids)
        yield [*ids, tokenizer.eos_id]


def build(
    kinds: dict[str, list[str]], tests: dict[str, list[str]], tokenizer: Any, *,
    tokens: int = 8192, train_tokens: int = 5_000_000, count: int = 8,
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:  # fmt: skip
    """Arrays `train` (all kinds, file after file) and `validation/KIND`, `test/KIND` (count, N).

    `tests` names files of a kind that only test; without them some files of the kind do.
    """
    rows: list[list[int]] = []
    arrays: dict[str, np.ndarray] = {}
    names: dict[str, list[str]] = {}
    for kind, patterns in kinds.items():
        files = find_files(patterns)
        test_files = set(find_files(tests.get(kind, [])))
        parts = {
            s: [f for f in files if file_split(f) == s and f not in test_files]
            for s in CORPUS_SPLITS
        }
        if test_files:
            parts["test"] = [f for f in find_files(tests[kind]) if f in test_files]
        for split in CORPUS_SPLITS[1:]:
            rows_of_kind, names[f"{split}/{kind}"] = sequences(
                parts[split], tokenizer, tokens, count
            )
            if not rows_of_kind:
                raise ValueError(
                    f"{kind} must have a {split} file of {tokens} tokens, got {len(parts[split])} "
                    "files, all shorter"
                )
            arrays[f"{split}/{kind}"] = np.array(rows_of_kind, dtype=np.int32)
        rows += stream(parts["train"], tokenizer, train_tokens)
    random.Random(0).shuffle(rows)
    arrays["train"] = np.concatenate([np.array(row, dtype=np.int32) for row in rows])
    return arrays, names


class Windows(Dataset[Tensor]):
    """Random runs of N tokens of a long row, the same ones for the same seed."""

    def __init__(self, row: np.ndarray, tokens: int, length: int, seed: int = 0) -> None:
        if len(row) <= tokens:
            raise ValueError(f"row must have more than {tokens} tokens, got {len(row)}")
        self.row, self.tokens, self.length, self.seed = row, tokens, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        generator = np.random.default_rng((self.seed, index))
        start = int(generator.integers(0, len(self.row) - self.tokens))
        return torch.from_numpy(self.row[start : start + self.tokens].astype(np.int64))


class CorpusData(L.LightningDataModule):
    """Sequences of one length from a file that `build` made.

    Args:
        path: the file.
        tokens: N, at most what it was built for.
        length: training sequences of an epoch.
        validation: sequences of each kind that are validated on.
    """

    def __init__(
        self,
        path: str,
        tokens: int = 8192,
        *,
        length: int = 100_000,
        batch_size: int = 1,
        validation: int = 2,
    ) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise ValueError(f"path must be a file of recipes.data.text_corpus, got {path!r}")
        self.arrays = dict(np.load(path))
        self.tokens, self.length, self.batch_size = tokens, length, batch_size
        self.validation = validation

    def kinds(self, split: str = "validation") -> dict[str, Tensor]:
        """(count, N) of each kind."""
        by_kind = {k.split("/")[1]: v for k, v in self.arrays.items() if k.startswith(split + "/")}
        return {
            k: torch.from_numpy(v[:, : self.tokens].astype(np.int64)) for k, v in by_kind.items()
        }

    def train_dataloader(self) -> DataLoader[Tensor]:
        windows: Any = Windows(self.arrays["train"], self.tokens, self.length)
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        # Windows are drawn already: processes take turns, a run that goes on finds its place.
        sampler = ShardedOrder(SequentialSampler(windows), self.trainer) if several else None
        return ResumableLoader(
            windows, batch_size=self.batch_size, sampler=sampler, generator=torch.Generator()
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        rows: Any = torch.cat([v[: self.validation] for v in self.kinds().values()])
        return DataLoader(rows, batch_size=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Tokenise files to distill a language model.")
    parser.add_argument("out", type=Path, help="npz file to write")
    for option, meaning in (("--kind", "files of a kind"), ("--test", "files that only test")):
        parser.add_argument(
            option, nargs="+", action="append", default=[], metavar="NAME PATTERN", help=meaning
        )
    parser.add_argument("--tokenizer", default="smollm2", help='"smollm2", a folder or a name')
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--train-tokens", type=int, default=5_000_000, help="of each kind")
    parser.add_argument("--count", type=int, default=8, help="sequences of each kind to test on")
    args = parser.parse_args(argv)
    if not args.kind:
        parser.error("argument --kind: must be given, such as --kind text 'docs/**/*.html'")
    if args.tokenizer == "smollm2":
        from mm_sparse.recipes.data.tokenizers import SmolLM2Tokenizer

        tokenizer: Any = SmolLM2Tokenizer()
    else:
        from mm_sparse.recipes.data.tokenizers import HFTokenizer

        tokenizer = HFTokenizer(args.tokenizer)
    arrays, names = build(
        {k: p for k, *p in args.kind}, {k: p for k, *p in args.test}, tokenizer,
        tokens=args.tokens, train_tokens=args.train_tokens, count=args.count,
    )  # fmt: skip
    np.savez_compressed(args.out, **arrays)  # type: ignore[arg-type]
    for part, files in names.items():
        print(part, *files, sep="\n  ")
    print(f"train: {len(arrays['train'])} tokens")


if __name__ == "__main__":
    main()
