"""Speech and images in tar files, as WebDataset keeps them.

TarShards(["part-000.tar"])       key.wav, key.txt or key.json with "text"
ImageShards(["part-000.tar"])     key.jpg, key.txt or key.json with "text"
"""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mm_sparse.recipes.data.audio_files import MAX_SAMPLES, SUFFIXES, read_audio
from mm_sparse.recipes.data.images import MAX_PIXELS, read_tensor
from mm_sparse.recipes.data.samples import MediaError, MediaSamples, Sample, Turn
from mm_sparse.recipes.data.speech_manifests import QUESTION, Clip, Clips, need
from mm_sparse.recipes.data.splits import Split

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class TarShards(Clips):
    """Tar files whose members KEY.wav (flac, ogg, mp3) and KEY.txt, or KEY.json, belong together.

    Read in place: a first pass notes where members lie.
    """

    def __init__(
        self,
        paths: list[str],
        *,
        split: Split | None = None,
        question: str = QUESTION,
        answer: str = "text",
        max_samples: int = MAX_SAMPLES,
    ) -> None:
        """
        Args:
            answer: key of a JSON member that the model is to say.
            max_samples: that of `read_audio`; a clip with more counts as damaged.
        """
        clips: list[Clip] = []
        self.places: dict[str, tuple[int, int]] = {}
        for path in paths:
            for name, members in shard_members(path).items():
                suffix = next((s for s in SUFFIXES if s[1:] in members), None)
                if suffix is None:
                    raise ValueError(f"{name}: must have an audio clip among {', '.join(SUFFIXES)}")
                with Path(path).open("rb") as file:
                    text = _text_of(file, name, members, answer)
                self.places[name] = members[suffix[1:]]
                clips.append(Clip(Path(path), text, name))
        source = ", ".join(paths)
        super().__init__(clips, source, split=split, question=question, max_samples=max_samples)

    def size(self, index: int) -> float | None:
        """Bytes: of one format and rate they grow with time."""
        return float(self.places[self.clips[index].name][1])

    def waveform(self, clip: Clip) -> Tensor:
        try:
            data = _slice(clip.path, self.places[clip.name])
        except OSError as error:
            raise MediaError(f"{clip.name}: {error}") from error
        return read_audio(data, clip.name, max_samples=self.max_samples)


@dataclass(frozen=True)
class Picture:
    """An image in a tar file, and what is said about it."""

    path: Path
    place: tuple[int, int]
    question: str
    text: str
    name: str


class ImageShards(MediaSamples):
    """Tar files whose members KEY.jpg (jpeg, png, webp) and KEY.txt, or KEY.json, belong together.

    Read in place: a first pass notes where members lie. The image stands before the question.
    """

    def __init__(
        self,
        paths: list[str],
        *,
        question: str = "Describe the image.",
        answer: str = "text",
        asked: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """
        Args:
            question: what is asked about each image.
            answer: key of a JSON member that the model is to say, "caption" for one.
            asked: key of a JSON member that is asked instead of `question`.
            max_pixels: that of `read_image`; an image with more counts as damaged.
        """
        super().__init__()
        self.max_pixels = max_pixels
        self.pictures: list[Picture] = []
        for path in paths:
            for name, members in shard_members(path).items():
                suffix = next((s for s in IMAGE_SUFFIXES if s[1:] in members), None)
                if suffix is None:
                    wanted = ", ".join(IMAGE_SUFFIXES)
                    raise ValueError(f"{name}: must have an image among {wanted}")
                if asked is not None and "json" not in members:
                    raise ValueError(f"{name}: must have a json member with {asked!r}")
                with Path(path).open("rb") as file:
                    text = _text_of(file, name, members, answer)
                    own = question if asked is None else _text_of(file, name, members, asked)
                place = members[suffix[1:]]
                self.pictures.append(Picture(Path(path), place, own, text, name))
        if not self.pictures:
            raise ValueError(f"paths must hold an image with a text, got none in {paths}")

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int) -> Sample:
        picture = self.pictures[index]
        try:
            data = _slice(picture.path, picture.place)
        except OSError as error:
            raise MediaError(f"{picture.name}: {error}") from error
        image = read_tensor(data, name=picture.name, max_pixels=self.max_pixels)
        turns = (Turn((image, picture.question)), Turn((picture.text,), answer=True))
        return Sample(turns, picture.name)


def shard_members(path: str) -> dict[str, dict[str, tuple[int, int]]]:
    """By sample, the place (offset, bytes) of each member by its suffix."""
    members_by_key: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    key, _, suffix = Path(member.name).name.partition(".")
                    folder = Path(member.name).parent
                    place = member.offset_data, member.size
                    members_by_key.setdefault(f"{path}: {folder / key}", {})[suffix.lower()] = place
    except tarfile.TarError as error:
        raise ValueError(f"{path}: must be a tar file without compression: {error}") from error
    return members_by_key


def _slice(path: Path, place: tuple[int, int]) -> bytes:
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _text_of(file: Any, name: str, members: dict[str, tuple[int, int]], answer: str) -> str:
    kind = "json" if "json" in members else "txt"
    if kind not in members:
        raise ValueError(f"{name}: must have a txt or a json member beside the file")
    file.seek(members[kind][0])
    try:
        text: Any = file.read(members[kind][1]).decode("utf-8")
        row = json.loads(text) if kind == "json" else {answer: text}
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: its {kind} member is not {kind.upper()}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{name}: its json member must be an object, got {type(row).__name__}")
    text = need(name, row, answer, str)
    if not text.strip():
        raise ValueError(f"{name}: {answer!r} must hold words, got {text!r}")
    return text.strip()
