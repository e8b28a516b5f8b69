"""Samples to a batch: text to ids, a token for every patch and every stretch of audio, packing."""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from mm_sparse.recipes.data.samples import IGNORED, Batch, Sample, Template
from mm_sparse.recipes.data.tokenizers import Tokenizer

logger = logging.getLogger(__name__)


@dataclass
class Encoded:
    """One sample as tokens."""

    ids: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    """Which answer of the sample a token belongs to, -1 elsewhere."""
    grids: list[tuple[int, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Its answers."""
    sample: Sample = field(default_factory=lambda: Sample(()))

    def add(self, ids: list[int], answer: int = -1) -> None:
        self.ids += ids
        self.answers += [answer] * len(ids)


class Collator:
    """Samples to a `Batch`. An over-long sample is dropped whole, counted in `dropped`, and logged.

    With worker processes each has its own count; sum the batches' `dropped` there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        patch_size: int | None = None,
        samples_per_token: int | None = None,
        template: Template | None = None,
        pack: bool = False,
    ) -> None:
        """
        Args:
            max_length: tokens of a row at most.
            patch_size: pixels that one image token covers, each way; None: no images.
            samples_per_token: samples of audio that one audio token covers; None: no audio.
            pack: put samples behind each other into rows of up to `max_length` tokens, each a
                document of its own.
        """
        for name, value in (
            ("max_length", max_length),
            ("patch_size", patch_size),
            ("samples_per_token", samples_per_token),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.tokenizer = tokenizer
        self.patch_size, self.samples_per_token = patch_size, samples_per_token
        self.max_length, self.pack = max_length, pack
        self.template = template or Template()
        self.dropped = 0

    def grid(self, image: Tensor, name: str) -> tuple[int, int]:
        """Rows and columns of the image tokens of an image (3, height, width)."""
        if self.patch_size is None:
            raise ValueError(f"{name}: patch_size must be given for an image, got None")
        height, width = image.shape[-2:]
        if not height or not width or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"{name}: image sides must be positive multiples of patch_size="
                f"{self.patch_size}, got {height} x {width}"
            )
        return height // self.patch_size, width // self.patch_size

    def audio_tokens(self, audio: Tensor, name: str) -> int:
        """Audio tokens of an audio clip (samples,); the last one may cover its end only."""
        if self.samples_per_token is None:
            raise ValueError(f"{name}: samples_per_token must be given for an audio clip, got None")
        return -(-len(audio) // self.samples_per_token)

    def text(self, text: str, name: str) -> list[int]:
        """Token ids of a text, which must not spell the image token."""
        ids = self.tokenizer.encode(text) if text else []
        if self.tokenizer.image_id in ids:
            raise ValueError(f"{name}: text must not contain the image token, got {text!r}")
        return ids

    def encode(self, sample: Sample) -> Encoded:
        """Tokens of a sample, of any length."""
        out = Encoded(sample=sample)
        out.add(list(self.tokenizer.start))
        for turn in sample.turns:
            before, after = self.template.answer if turn.answer else self.template.question
            out.add(self.text(before, sample.name))
            learned = len(out.texts) if turn.answer else -1
            for part in turn.content:
                if isinstance(part, str):
                    out.add(self.text(part, sample.name), learned)
                elif part.ndim == 1:
                    count = self.audio_tokens(part, sample.name)
                    out.add([self.tokenizer.audio_id] * count)
                elif part.ndim == 4:
                    raise ValueError(f"{sample.name}: content must hold no video, got one")
                else:
                    h, w = self.grid(part, sample.name)
                    out.grids.append((h, w))
                    out.add([self.tokenizer.image_id] * (h * w))
            if turn.answer:
                out.add([self.tokenizer.eos_id], learned)
                out.texts.append("".join(str(part) for part in turn.content))
            out.add(self.text(after, sample.name))
        return out

    def fitting(self, samples: list[Sample]) -> list[Encoded]:
        """Tokens of the samples that are not too long."""
        encoded: list[Encoded] = []
        for sample in samples:
            one = self.encode(sample)
            if len(one.ids) > self.max_length:
                logger.warning(
                    "dropped sample %s: %d tokens, max_length is %d",
                    sample.name or "without a name",
                    len(one.ids),
                    self.max_length,
                )
                continue
            encoded.append(one)
        self.dropped += len(samples) - len(encoded)
        return encoded

    def rows(self, encoded: list[Encoded]) -> list[list[Encoded]]:
        """One sample a row or, packed, the longest first, each into the first row with room."""
        if not self.pack:
            return [[one] for one in encoded]
        rows: list[list[Encoded]] = []
        room: list[int] = []
        for one in sorted(encoded, key=lambda one: -len(one.ids)):
            need = len(one.ids)
            place = next((i for i, left in enumerate(room) if left >= need), len(rows))
            if place == len(rows):
                rows.append([])
                room.append(self.max_length)
            rows[place].append(one)
            room[place] -= need
        return rows

    def __call__(self, samples: list[Sample]) -> Batch:
        encoded = self.fitting(samples)
        rows = self.rows(encoded)
        order = [one for row in rows for one in row]
        images = [image for one in order for image in one.sample.images]
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1:
            names = ", ".join(sample.name for sample in samples)
            raise ValueError(f"images of a batch must have one size, got {sizes} in {names}")
        waveforms = [audio.float() for one in order for audio in one.sample.audio]

        lengths = [sum(len(one.ids) for one in row) for row in rows]
        shape = (len(rows), max(lengths, default=0))
        input_ids = torch.full(shape, self.tokenizer.pad_id)
        answer_index = torch.full(shape, -1)
        attention_mask = torch.zeros(shape, dtype=torch.bool)
        position_ids = torch.arange(shape[1]).repeat(shape[0], 1)
        texts: list[str] = []
        for b, row in enumerate(rows):
            start = 0
            for one in row:
                end = start + len(one.ids)
                input_ids[b, start:end] = torch.tensor(one.ids)
                index = torch.tensor(one.answers)
                answer_index[b, start:end] = torch.where(index >= 0, index + len(texts), -1)
                # Padding goes on counting: it is no document of its own.
                position_ids[b, start:] = torch.arange(shape[1] - start)
                texts += one.texts
                start = end
            attention_mask[b, :start] = True
        return Batch(
            input_ids=input_ids,
            labels=torch.where(answer_index >= 0, input_ids, IGNORED),
            attention_mask=attention_mask,
            position_ids=position_ids,
            answer_index=answer_index,
            pixel_values=torch.stack(images) if images else torch.zeros(0, 3, 0, 0),
            image_grids=[grid for one in order for grid in one.grids],
            waveforms=self.waveforms(waveforms),
            audio_lengths=torch.tensor([len(audio) for audio in waveforms], dtype=torch.long),
            answers=texts,
            dropped=len(samples) - len(encoded),
        )

    def waveforms(self, waveforms: list[Tensor]) -> Tensor:
        """(A, S), S a multiple of `samples_per_token`."""
        if not waveforms:
            return torch.zeros(0, 0)
        padded = pad_sequence(waveforms, batch_first=True)
        return pad(padded, (0, -padded.shape[1] % (self.samples_per_token or 1)))
