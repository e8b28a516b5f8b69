"""Conversations in the form of transformers' chat templates, audio parts among those of text.

{"messages": [{"role": "user", "content": [{"type": "audio", "path": "a.wav"},
                                           {"type": "text", "text": "Transcribe."}]},
              {"role": "assistant", "content": "Hello."}]}
"""

from pathlib import Path
from typing import Any

from mm_sparse.recipes.data.audio_files import read_audio
from mm_sparse.recipes.data.samples import Sample, Turn
from mm_sparse.recipes.data.speech_manifests import MediaSamples, json_lines, need

ROLES = {"system": False, "user": False, "assistant": True}


class Messages(MediaSamples):
    """JSON lines in the form of transformers' chat templates, audio parts among those of text."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.rows = [
            (name, self.turns(name, row, Path(path).parent)) for name, row in json_lines(path)
        ]
        if not self.rows:
            raise ValueError(f"{path}: it must hold a conversation, got none")

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def turns(name: str, row: dict[str, Any], folder: Path) -> list[tuple[bool, list[str | Path]]]:
        """Whether the model says it, and what is said; a path stands for its audio."""
        turns: list[tuple[bool, list[str | Path]]] = []
        for number, message in enumerate(need(name, row, "messages", list)):
            where = f"{name}: message {number}"
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise ValueError(f"{where}: 'role' must be system, user or assistant")
            content = message.get("content")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(parts, list) or not parts:
                raise ValueError(f"{where}: 'content' must be a text or a list, got {content!r}")
            content: list[str | Path] = []
            for part in parts:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind == "text" and isinstance(part.get("text"), str):
                    content.append(part["text"])
                elif kind == "audio":
                    file = part.get("path") or part.get("url") or part.get("audio")
                    if not isinstance(file, str) or not (folder / file).is_file():
                        raise ValueError(f"{where}: 'path' must be an audio file, got {file!r}")
                    content.append(folder / file)
                else:
                    raise ValueError(f"{where}: a part must be text or audio, got {part!r}")
            answer = ROLES[message["role"]]
            if answer and any(isinstance(part, Path) for part in content):
                raise ValueError(f"{where}: an answer must be text, got audio in it")
            turns.append((answer, content))
        if not any(answer for answer, _ in turns):
            raise ValueError(f"{name}: needs a message of the assistant, got none")
        return turns

    def read(self, index: int) -> Sample:
        name, turns = self.rows[index]
        sample_turns = []
        for answer, content in turns:
            read = [read_audio(p, f"{name}: {p}") if isinstance(p, Path) else p for p in content]
            sample_turns.append(Turn(tuple(read), answer))
        return Sample(tuple(sample_turns), name)
