"""Rows of a given length that scorers learn from, read from files as they are needed.

B rows, N tokens of a batch
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_sparse.recipes.data import (
    ConcatSamples,
    LlavaJson,
    Manifest,
    Messages,
    Samples,
    find_files,
    read_text,
)
from mm_sparse.recipes.finetuning import ChatCollator, check_packs, messages_of, pack_rows

logger = logging.getLogger(__name__)
Batch = dict[str, Tensor]
"""Inputs of a model."""
JSON = (".jsonl", ".json", ".ndjson")
TEXTS = (
    ".txt", ".md", ".rst", ".html", ".htm", ".tex", ".py", ".c", ".h", ".cpp", ".rs", ".go",
    ".java", ".js", ".ts", ".gz", ".npz", *JSON,
)  # fmt: skip
"""Ends of the names of files that are read of a folder."""
CHATS: dict[str, Callable[[Path], Samples]] = {
    "messages": lambda path: Messages(str(path)),
    "conversations": lambda path: LlavaJson(str(path), str(path.parent), image_size=None),
    "audio_filepath": lambda path: Manifest(str(path)),
}
"""What reads a JSON file, by a key that its first row has."""
PIECE = 100_000
"""Characters, or tokens of a corpus file, that are read at once."""


class Rows(ABC):
    """Batches without an end, whose state can be kept and restored."""

    about: str
    """What they are read from, in a sentence."""

    @abstractmethod
    def take(self) -> Batch:
        """The next batch, of at most N tokens with padding."""

    @abstractmethod
    def hold_back(self, count: int) -> list[Batch]:
        """The next batches, which never come again.

        Raises:
            ValueError: nothing is left to learn from.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where they are."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was read, in rows that have held back as many."""


class TextRows(Rows):
    """Texts behind each other, each with the end of text behind it, cut into rows (1, N).

    A text that is longer than a row goes on in the next. Each row begins with the start of text if
    the tokenizer has it.

    Args:
        files: texts, JSON lines with a "text" or with "messages", and files of
            `recipes.data.text_corpus` (their part that trains), in this order.
        tokenizer: of transformers.
        tokens: N.
    Raises:
        ValueError: there are no files, or a row of a file has no text.
    """

    def __init__(self, files: Sequence[Path], tokenizer: Any, tokens: int) -> None:
        if not files:
            raise ValueError("files must name one or more, got none")
        self.files, self.tokenizer, self.tokens = list(files), tokenizer, tokens
        empty = tokenizer("").input_ids
        self.head = [i for i in empty if i == tokenizer.bos_token_id][:1]
        self.tail = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.about = f"texts of {len(files)} files"
        self._file, self._place, self._rest = 0, 0, list[int]()
        self._begin: tuple[int, int, list[int]] = (0, 0, [])
        self._laps = 0
        self._pieces: Iterator[tuple[list[int], int]] | None = None

    def take(self) -> Batch:
        wanted = self.tokens - len(self.head)
        laps = self._laps
        while len(self._rest) < wanted:
            if self._pieces is None:
                self._pieces = self._read(self.files[self._file], self._place)
            found = next(self._pieces, None)
            if found is not None:
                self._rest += found[0]
                self._place = found[1]
                continue
            self._pieces, self._file, self._place = None, self._file + 1, 0
            if self._file == len(self.files):
                self._laps += 1
                if self._laps > laps + 1 and not self._rest:
                    raise ValueError(f"data must hold text, got none in {len(self.files)} files")
                self._file, self._place = self._begin[:2]
                self._rest = [*self._rest, *self._begin[2]]
        row, self._rest = self._rest[:wanted], self._rest[wanted:]
        return {"input_ids": torch.tensor([self.head + row])}

    def hold_back(self, count: int) -> list[Batch]:
        rows = [self.take() for _ in range(count)]
        if self._laps:
            raise ValueError(
                f"data must hold more than {count} rows of {self.tokens} tokens, which are held "
                f"back to measure on, got less in {len(self.files)} files"
            )
        self._begin = (self._file, self._place, list(self._rest))
        return rows

    def state(self) -> dict[str, Any]:
        own = {"file": self._file, "place": self._place, "rest": list(self._rest)}
        return own | {"laps": self._laps}

    def restore(self, state: dict[str, Any]) -> None:
        self._file, self._place, self._rest = state["file"], state["place"], list(state["rest"])
        self._laps, self._pieces = state["laps"], None

    def _read(self, path: Path, place: int) -> Iterator[tuple[list[int], int]]:
        """Tokens from a place of a file on, and the place behind them."""
        if path.suffix == ".npz":
            ids = np.load(path)["train"]
            for start in range(place, len(ids), PIECE):
                yield ids[start : start + PIECE].tolist(), start + PIECE
        elif path.suffix in JSON:
            with path.open("rb") as stream:
                stream.seek(place)
                while line := stream.readline():
                    if line.strip():
                        text = self._text_of(line, f"{path}, byte {stream.tell() - len(line)}")
                        yield [*self._encode(text), *self.tail], stream.tell()
        else:
            text = read_text(path)
            for start in range(place, len(text), PIECE):
                end = start + PIECE
                last = self.tail if end >= len(text) else []
                yield [*self._encode(text[start:end]), *last], end

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _text_of(self, line: bytes, where: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"data must hold one JSON object in a line, got {where}") from error
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            return row["text"]
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise ValueError(f'data must have "text" or "messages" in each row, got {where}')
        if not self.tokenizer.chat_template:
            raise ValueError("data must be texts: the tokenizer has no chat template for messages")
        return self.tokenizer.apply_chat_template(
            [_plain(message, where) for message in row["messages"]], tokenize=False
        )


def _plain(message: Any, where: str) -> dict[str, str]:
    """A message whose content is one text."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(content, str):
        raise ValueError(f"data must hold texts alone for a model of text, got {where}")
    return {"role": str(message.get("role")), "content": content}


class ChatRows(Rows):
    """Conversations with images or audio, as many in a batch as N tokens hold.

    They stand behind each other in one row where the model is known to keep them apart, else they
    are padded. One that is longer than N is left out.

    Args:
        samples: conversations, read when they are needed.
        processor: of the checkpoint.
        model: that of transformers.
        tokens: N.
        seed: of the order.
    """

    def __init__(
        self, samples: Samples, processor: Any, model: Any, tokens: int, seed: int = 0
    ) -> None:
        self.samples, self.model, self.tokens, self.seed = samples, model, tokens, seed
        self.collator = ChatCollator(processor)
        self.about = f"{len(samples)} conversations"
        try:
            check_packs(model)
            self.packs = True
        except ValueError:
            self.packs = False
        self.too_long: set[int] = set()
        self._pool = self._shuffled(list(range(len(samples))), 0)
        self._epoch, self._next = 0, 0
        self._order = self._pool
        self._lengths: dict[int, int] = {}

    def take(self) -> Batch:
        return self._take(len(self.samples))

    def _take(self, most: int) -> Batch:
        """The next batch, of so many conversations at most."""
        chats: list[Any] = []
        total = longest = 0
        while len(chats) < most:
            if self._next == len(self._order):
                if chats:
                    break
                if len(self.too_long) >= len(self._pool):
                    raise ValueError(
                        f"tokens must be at least those of a conversation, got {self.tokens}, "
                        f"{len(self.too_long)} are longer"
                    )
                self._epoch += 1
                self._order, self._next = self._shuffled(self._pool, self._epoch), 0
            number = self._order[self._next]
            chat = messages_of(self.samples[number], self.collator.rate)
            length = self._length(number, chat)
            if length > self.tokens:
                if number not in self.too_long:
                    self.too_long.add(number)
                    logger.warning(
                        "left out conversation %d: %d tokens, a row holds %d",
                        number, length, self.tokens,
                    )  # fmt: skip
                self._next += 1
                continue
            wide = max(longest, length)
            if (total + length if self.packs else wide * (len(chats) + 1)) > self.tokens:
                break
            chats.append(chat)
            total, longest, self._next = total + length, wide, self._next + 1
        batch = self.collator.inputs(chats)
        return pack_rows(self.model, batch) if self.packs else batch

    def hold_back(self, count: int) -> list[Batch]:
        # A tenth of all, where they are few.
        most = max(len(self.samples) // (10 * count), 1)
        batches = [self._take(most) for _ in range(count)]
        self._pool = self._pool[self._next :]
        if self._epoch or not self._pool:
            raise ValueError(
                f"data must hold more conversations than are held back to measure on, got "
                f"{len(self.samples)}"
            )
        self._order, self._next = self._pool, 0
        return batches

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        self._epoch, self._next = state["epoch"], state["next"]
        pool = self._pool
        self._order = self._shuffled(pool, self._epoch) if self._epoch else pool

    def _length(self, number: int, chat: Any) -> int:
        if number not in self._lengths:
            made = self.collator.inputs([chat])
            self._lengths[number] = int(made["attention_mask"].sum())
        return self._lengths[number]

    def _shuffled(self, numbers: list[int], epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(numbers), generator=generator).tolist()
        return [numbers[i] for i in order]


def open_rows(data: Sequence[str], processor: Any, model: Any, tokens: int, seed: int = 0) -> Rows:
    """Rows of files, folders and patterns: texts, or conversations for a processor.

    Raises:
        ValueError: nothing is there, or texts and conversations are mixed.
    """
    files: list[Path] = []
    for name in data:
        path = Path(name)
        pattern = str(path / "**" / "*") if path.is_dir() else name
        found = find_files([pattern], smallest=1)
        if path.is_dir():
            found = [file for file in found if file.suffix in TEXTS]
        if not found:
            raise ValueError(f"data must name files, folders or patterns of them, got {name!r}")
        files += found
    kinds = {path: _kind(path) for path in files}
    tokenizer = getattr(processor, "tokenizer", None)
    chats = [path for path in files if kinds[path] in CHATS]
    if tokenizer is None or not chats:
        other = next((p for p in chats if kinds[p] != "messages"), None)
        if other is not None:
            raise ValueError(f"data must be texts or messages for a model of text, got {other}")
        return TextRows(files, processor if tokenizer is None else tokenizer, tokens)
    if len(chats) < len(files):
        rest = next(path for path in files if path not in chats)
        raise ValueError(f"data must be texts or conversations, got both: {chats[0]} and {rest}")
    samples = [CHATS[kinds[path]](path) for path in chats]
    return ChatRows(ConcatSamples(samples), processor, model, tokens, seed)


def _kind(path: Path) -> str:
    """A key of the first row of a JSON file that says what it is; "" for texts."""
    if path.suffix not in JSON:
        return ""
    with path.open("rb") as stream:
        line = stream.readline()
        try:
            row = json.loads(line)
        except ValueError:
            # A list over several lines.
            stream.seek(0)
            try:
                row = json.loads(stream.read())
            except ValueError as error:
                raise ValueError(f"data must hold JSON, got {path}: {error}") from error
    row = row[0] if isinstance(row, list) and row else row
    keys = row.keys() if isinstance(row, dict) else ()
    return next((key for key in CHATS if key in keys), "")
