"""Conversations in the form of transformers' chat templates: texts, images, audio and videos.

{"messages": [{"role": "user", "content": [{"type": "audio", "path": "a.wav"},
                                           {"type": "text", "text": "Transcribe."}]},
              {"role": "assistant", "content": "Hello."}]}
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mm_sparse.recipes.data.audio_files import MAX_SAMPLES, read_audio
from mm_sparse.recipes.data.images import MAX_PIXELS, read_tensor, read_video
from mm_sparse.recipes.data.samples import MediaSamples, Sample, Turn
from mm_sparse.recipes.data.speech_manifests import Segment, json_lines, need, segment_of

ROLES = {"system": False, "user": False, "assistant": True}


@dataclass(frozen=True)
class AudioPart:
    """The audio that a part of a message names."""

    path: Path
    segment: Segment


@dataclass(frozen=True)
class ImagePart:
    """The image that a part of a message names."""

    path: Path


@dataclass(frozen=True)
class VideoPart:
    """The video that a part of a message names: a file, or the files of its frames."""

    paths: tuple[Path, ...]


Part = str | AudioPart | ImagePart | VideoPart


@dataclass(frozen=True)
class Message:
    """What one side says, before its files are read."""

    content: tuple[Part, ...]
    answer: bool
    """Whether the model learns to say it."""
    system: bool = False
    """Whether it instructs the model ahead of the conversation."""


class Messages(MediaSamples):
    """JSON lines, or a JSON list, in the form of transformers' chat templates.

    An audio part is `duration` seconds of its file, from `offset` seconds on, if it has these keys.
    A video part names a file, or a list with the images of its frames.
    """

    def __init__(
        self,
        path: str,
        *,
        max_samples: int = MAX_SAMPLES,
        max_pixels: int = MAX_PIXELS,
        frames: int = 16,
    ) -> None:
        """
        Args:
            max_samples: that of `read_audio`; a part with more counts as damaged.
            max_pixels: that of `read_image`; an image with more counts as damaged.
            frames: of a video that are read at most, evenly spread over it.
        """
        super().__init__()
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        folder = Path(path).parent
        self.max_samples, self.max_pixels, self.frames = max_samples, max_pixels, frames
        self.rows = [(name, parse_messages(name, row, folder)) for name, row in _rows(path)]
        if not self.rows:
            raise ValueError(f"{path}: it must hold a conversation, got none")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Sample:
        name, messages = self.rows[index]
        turns = []
        for message in messages:
            content = tuple(self._read(name, part) for part in message.content)
            turns.append(Turn(content, message.answer, system=message.system))
        return Sample(tuple(turns), name)

    def _read(self, name: str, part: Part) -> str | Tensor:
        if isinstance(part, str):
            return part
        if isinstance(part, ImagePart):
            where = f"{name}: {part.path}"
            return read_tensor(part.path, name=where, max_pixels=self.max_pixels)
        if isinstance(part, VideoPart):
            return read_video(part.paths, self.frames, name=name, max_pixels=self.max_pixels)
        return self._waveform(name, part)

    def _waveform(self, name: str, part: AudioPart) -> Tensor:
        return read_audio(
            part.path,
            f"{name}: {part.path}",
            offset=part.segment.offset,
            duration=part.segment.duration,
            max_samples=self.max_samples,
        )


def parse_messages(name: str, row: dict[str, Any], folder: Path) -> list[Message]:
    """The messages of a row, whose files are relative to `folder`; `name` is that of the row.

    Raises:
        ValueError: the row is no conversation with an answer, or names a file that is not there.
    """
    messages = []
    for number, record in enumerate(need(name, row, "messages", list)):
        where = f"{name}: message {number}"
        role = record.get("role") if isinstance(record, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{where}: 'role' must be system, user or assistant")
        said = record.get("content")
        parts = [{"type": "text", "text": said}] if isinstance(said, str) else said
        if not isinstance(parts, list) or not parts:
            raise ValueError(f"{where}: 'content' must be a text or a list, got {said!r}")
        content = tuple(_parse_part(where, part, folder) for part in parts)
        other = next((part for part in content if not isinstance(part, str)), None)
        if ROLES[role] and other is not None:
            kind = type(other).__name__.removesuffix("Part").lower()
            raise ValueError(f"{where}: an answer must be text, got {kind} in it")
        messages.append(Message(content, ROLES[role], role == "system"))
    if not any(message.answer for message in messages):
        raise ValueError(f"{name}: needs a message of the assistant, got none")
    return messages


def _rows(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of JSON lines, or of a file with one JSON list."""
    if Path(path).is_file() and Path(path).read_bytes().lstrip().startswith(b"["):
        try:
            rows = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError):
            return json_lines(path)
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                got = type(row).__name__
                raise ValueError(f"{path}: row {number}: must be an object, got {got}")
        return [(f"{path}: row {number}", row) for number, row in enumerate(rows)]
    return json_lines(path)


def _parse_part(where: str, part: Any, folder: Path) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("image", "audio", "video"):
        raise ValueError(f"{where}: a part must be text, image, audio or video, got {part!r}")
    file: Any = part.get("path") or part.get("url") or part.get(kind)
    names: list[Any] = file if kind == "video" and isinstance(file, list) and file else [file]
    article = "a" if kind == "video" else "an"
    for name in names:
        if not isinstance(name, str) or not (folder / name).is_file():
            raise ValueError(f"{where}: 'path' must be {article} {kind} file, got {name!r}")
    if kind == "video":
        return VideoPart(tuple(folder / name for name in names))
    path = folder / names[0]
    return ImagePart(path) if kind == "image" else AudioPart(path, segment_of(where, part))
