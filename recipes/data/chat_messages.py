"""Conversations in the form of transformers' chat templates, audio parts among those of text.

{"messages": [{"role": "user", "content": [{"type": "audio", "path": "a.wav"},
                                           {"type": "text", "text": "Transcribe."}]},
              {"role": "assistant", "content": "Hello."}]}
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mm_sparse.recipes.data.audio_files import MAX_SAMPLES, read_audio
from mm_sparse.recipes.data.samples import MediaSamples, Sample, Turn
from mm_sparse.recipes.data.speech_manifests import Segment, json_lines, need, segment_of

ROLES = {"system": False, "user": False, "assistant": True}


@dataclass(frozen=True)
class AudioPart:
    """The audio that a part of a message names."""

    path: Path
    segment: Segment


@dataclass(frozen=True)
class Message:
    """What one side says, before its audio is read."""

    content: tuple[str | AudioPart, ...]
    answer: bool
    """Whether the model learns to say it."""


class Messages(MediaSamples):
    """JSON lines in the form of transformers' chat templates, audio parts among those of text.

    An audio part is `duration` seconds of its file, from `offset` seconds on, if it has these keys.
    """

    def __init__(self, path: str, *, max_samples: int = MAX_SAMPLES) -> None:
        """`max_samples` is that of `read_audio`: a part with more counts as damaged."""
        super().__init__()
        folder = Path(path).parent
        self.max_samples = max_samples
        self.rows = [(name, parse_messages(name, row, folder)) for name, row in json_lines(path)]
        if not self.rows:
            raise ValueError(f"{path}: it must hold a conversation, got none")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Sample:
        name, messages = self.rows[index]
        turns = []
        for message in messages:
            content = [
                self._waveform(name, part) if isinstance(part, AudioPart) else part
                for part in message.content
            ]
            turns.append(Turn(tuple(content), message.answer))
        return Sample(tuple(turns), name)

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
        if ROLES[role] and any(isinstance(part, AudioPart) for part in content):
            raise ValueError(f"{where}: an answer must be text, got audio in it")
        messages.append(Message(content, ROLES[role]))
    if not any(message.answer for message in messages):
        raise ValueError(f"{name}: needs a message of the assistant, got none")
    return messages


def _parse_part(where: str, part: Any, folder: Path) -> str | AudioPart:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind != "audio":
        raise ValueError(f"{where}: a part must be text or audio, got {part!r}")
    file = part.get("path") or part.get("url") or part.get("audio")
    if not isinstance(file, str) or not (folder / file).is_file():
        raise ValueError(f"{where}: 'path' must be an audio file, got {file!r}")
    return AudioPart(folder / file, segment_of(where, part))
