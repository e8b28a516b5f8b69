"""Tokenizers with one interface: a closed list of words without a download, and transformers'."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from mm_sparse.recipes.pretrained import smollm2


class Tokenizer(ABC):
    """Text to ids and back. `image_id` stands for one patch of an image and never for text."""

    pad_id: int
    eos_id: int
    image_id: int
    size: int
    """Rows that an embedding table needs."""
    start: tuple[int, ...] = ()
    """Ids in front of every sample."""

    @property
    def audio_id(self) -> int:
        """Stands for a stretch of audio. It lies behind the table: no text can spell it."""
        return self.size

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str: ...


class WordTokenizer(Tokenizer):
    """Words, single digits and punctuation marks of a fixed list."""

    SPECIAL = ("<pad>", "<eos>", "<image>")
    PIECE = re.compile(r"\d|[^\W\d_]+|[^\w\s]|_")

    def __init__(self, words: Sequence[str]) -> None:
        repeated = {word for word in words if list(words).count(word) > 1}
        if repeated:
            raise ValueError(f"words must be distinct, got {sorted(repeated)} more than once")
        for word in words:
            if not self.PIECE.fullmatch(word):
                raise ValueError(f"words must be words, digits or marks, got {word!r}")
        self.words = (*self.SPECIAL, *words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.pad_id, self.eos_id, self.image_id = range(len(self.SPECIAL))
        self.size = len(self.words)

    def encode(self, text: str) -> list[int]:
        words = self.PIECE.findall(text.lower())
        unknown = [word for word in words if word not in self.ids]
        if unknown:
            raise ValueError(f"text must use the {self.size} known words, got {unknown[0]!r}")
        return [self.ids[word] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """Words with spaces between them, special tokens left out."""
        ids = [int(i) for i in ids]
        bad = [i for i in ids if not 0 <= i < self.size]
        if bad:
            raise ValueError(f"ids must be in [0, {self.size}), got {bad[0]}")
        return " ".join(self.words[i] for i in ids if i >= len(self.SPECIAL))


class HFTokenizer(Tokenizer):
    """A transformers tokenizer: a folder, a name, or the object itself.

    `image_token` is added where the vocabulary lacks it: then resize the embeddings to `size`.
    """

    def __init__(
        self, tokenizer: Any, image_token: str = "<image>", options: dict[str, Any] | None = None
    ) -> None:
        """`options` go to `AutoTokenizer.from_pretrained`, `gguf_file` for one."""
        if isinstance(tokenizer, str):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer, **(options or {}))
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must have an end-of-text token, got eos_token_id=None")
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False
            )
        self.tokenizer = tokenizer
        self.eos_id = tokenizer.eos_token_id
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.image_id = tokenizer.convert_tokens_to_ids(image_token)
        self.size = len(tokenizer)
        self.start = tuple(i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


class SmolLM2Tokenizer(HFTokenizer):
    """SmolLM2's own tokenizer, read from its GGUF file, with an image token."""

    def __init__(self) -> None:
        folder, file = smollm2()
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        # As transformers reads the file, the start of a turn would be the end of the text.
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
        super().__init__(tokenizer)
