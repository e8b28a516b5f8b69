"""Short clips joined to windows, and windows to conversations of many minutes.

    Joined(Manifest("prompts.jsonl"), seconds=28)                      each clip once, in order
    Joined(Manifest("prompts.jsonl"), seconds=28, length=10_000)       drawn at random
    Joined(held_out, before=Manifest("prompts.jsonl"), windows=20)     9 minutes that end held out

A window is what a tower hears at once, clips with a pause between them. A conversation has one
question and one answer for each of its windows: the last one is answered with all others in view.
"""

from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor

from mm_sparse.recipes.data.samples import RATE, Sample, Samples, Turn


class ConcatenatedClips(Samples):
    """Windows of several clips, `windows` of them in a conversation."""

    def __init__(
        self,
        samples: Samples,
        *,
        seconds: float = 28.0,
        shortest: float | None = None,
        pause: float = 0.4,
        windows: int = 1,
        before: Samples | None = None,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            samples: one audio clip, a question and its answer in each, of known size (seconds).
            seconds: of a window at most; a clip that is longer alone is left out.
            shortest: windows end at random lengths from here to `seconds`; None: all are filled.
            pause: seconds of silence between two clips.
            windows: questions of a conversation.
            before: what all windows but the last are made of, drawn at random; None: `samples`.
            length: conversations, drawn at random, the same for the same seed; None: the last
                windows hold every clip once, in order.
        """
        for name, value, low in (("windows", windows, 1), ("length", length, 0)):
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if pause < 0:
            raise ValueError(f"pause must be at least 0, got {pause}")
        if shortest is not None and not 0 < shortest <= seconds:
            raise ValueError(f"shortest must be in (0, seconds={seconds}], got {shortest}")
        self.samples, self.before = samples, before or samples
        self.seconds, self.shortest, self.pause = seconds, shortest, pause
        self.windows, self.length, self.seed = windows, length, seed
        self.sizes = _sizes("samples", samples, seconds)
        self.sizes_before = self.sizes if before is None else _sizes("before", before, seconds)
        self.numbers, self.numbers_before = list(self.sizes), list(self.sizes_before)
        self.groups = list(self._in_order()) if length is None else []

    def __len__(self) -> int:
        return len(self.groups) if self.length is None else self.length

    def size(self, index: int) -> float:
        """Seconds of all windows."""
        *first, last = self._plan(index)
        return sum(self._seconds(g, self.sizes_before) for g in first) + self._seconds(
            last, self.sizes
        )

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        plan = self._plan(index)
        turns: list[Turn] = []
        for place, group in enumerate(plan):
            source = self.samples if place == len(plan) - 1 else self.before
            turns += self._window([source[i] for i in group])
        return Sample(tuple(turns), f"joined/{self.seed}/{index}")

    def _plan(self, index: int) -> list[list[int]]:
        """Numbers of the clips of every window, the last window's of `samples`."""
        chance = Random(f"{self.seed} {index}")
        plan = [
            self._drawn(chance, self.numbers_before, self.sizes_before)
            for _ in range(self.windows - 1)
        ]
        last = (
            self._drawn(chance, self.numbers, self.sizes)
            if self.length is not None
            else self.groups[index]
        )
        return [*plan, last]

    def _drawn(self, chance: Random, numbers: list[int], sizes: dict[int, float]) -> list[int]:
        """Clips at random until the next one would not fit."""
        room = self.seconds
        if self.shortest is not None:
            room = chance.uniform(self.shortest, self.seconds)
        group: list[int] = []
        while True:
            clip = numbers[int(chance.random() * len(numbers))]
            room -= sizes[clip] + self.pause * bool(group)
            if group and room < 0:
                return group
            group.append(clip)

    def _in_order(self) -> Iterator[list[int]]:
        group: list[int] = []
        for clip in self.sizes:
            if group and self._seconds([*group, clip], self.sizes) > self.seconds:
                yield group
                group = []
            group.append(clip)
        yield group

    def _seconds(self, group: list[int], sizes: dict[int, float]) -> float:
        return sum(sizes[clip] for clip in group) + self.pause * (len(group) - 1)

    def _window(self, clips: list[Sample]) -> tuple[Turn, Turn]:
        """A question about all clips and their answers behind each other."""
        silence = torch.zeros(round(self.pause * RATE))
        waveforms: list[Tensor] = []
        for clip in clips:
            if len(clip.audio) != 1 or [turn.answer for turn in clip.turns] != [False, True]:
                raise ValueError(
                    f"{clip.name}: samples must hold one audio clip, a question and an answer, "
                    f"got {len(clip.audio)} clips and {len(clip.turns)} turns"
                )
            waveforms += [silence, clip.audio[0].float()]
        wave = torch.cat(waveforms[1:])
        asked, said = clips[0].turns
        question = tuple(wave if isinstance(part, Tensor) else part for part in asked.content)
        texts = ["".join(map(str, clip.turns[1].content)).strip() for clip in clips]
        return Turn(question), Turn((" ".join(texts),), answer=said.answer)


def _sizes(name: str, samples: Samples, seconds: float) -> dict[int, float]:
    """Seconds of the samples that fit into a window, by number."""
    sizes = {i: samples.size(i) for i in range(len(samples))}
    unknown = [i for i, size in sizes.items() if size is None]
    if unknown:
        raise ValueError(f"{name} must be of known size, sample {unknown[0]} has none")
    fitting = {i: float(size) for i, size in sizes.items() if size is not None and size <= seconds}
    if not fitting:
        raise ValueError(f"{name} must hold a sample of up to {seconds} s, got none")
    return fitting
