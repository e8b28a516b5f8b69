"""Samples whose images and audio are read when they are asked for; damaged files are skipped."""

import logging
from abc import abstractmethod

from mm_sparse.recipes.data.samples import Sample, Samples

logger = logging.getLogger(__name__)


class MediaError(ValueError):
    """An image or an audio file that cannot be read; the message names it."""


class MediaSamples(Samples):
    """Samples that are read when they are asked for; one with a damaged file is replaced.

    The next readable one takes its place. Each damaged one is named in the log once, with its file
    and row, and counted in `skipped`.
    """

    def __init__(self) -> None:
        self.bad: dict[int, str] = {}
        """What is wrong with each sample that was skipped in this process, by number."""

    @property
    def skipped(self) -> int:
        """Samples that could not be read, of those that were asked for in this process."""
        return len(self.bad)

    @abstractmethod
    def read(self, index: int) -> Sample:
        """The sample of a number in [0, len(self)).

        Raises:
            MediaError: a file of it cannot be read.
        """

    def __getitem__(self, index: int) -> Sample:
        """The sample of a number, or the next one that can be read.

        Raises:
            IndexError: a number out of range.
            MediaError: no sample can be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        for step in range(len(self)):
            number = (index + step) % len(self)
            try:
                return self.read(number)
            except MediaError as error:
                if number not in self.bad:
                    self.bad[number] = str(error)
                    logger.warning("skipped sample %d so far: %s", self.skipped, error)
        raise MediaError(f"none of {len(self)} samples can be read, the first: {self.bad[0]}")
