"""Speech with its text, as people keep it: JSONL manifests and LibriSpeech trees.

    Manifest("train.jsonl")           {"audio_filepath": "a.flac", "duration": 2.1, "text": "hello"}
    LibriSpeechTree("dev-clean")      reader/chapter/reader-chapter.trans.txt beside flac files

Rows are checked when a file is read: a bad one is an error that names file and row. Audio is read
when it is needed: a damaged file is skipped, counted and named as `MediaSamples` says. A text
belongs to one split, with all clips that speak it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mm_sparse.recipes.data.audio_files import MAX_SAMPLES, SUFFIXES, read_audio
from mm_sparse.recipes.data.samples import MediaSamples, Sample, Turn
from mm_sparse.recipes.data.splits import Split, check_split, split_of

QUESTION = "Transcribe the speech."


@dataclass(frozen=True)
class Segment:
    """A part of an audio file, or all of it."""

    offset: float = 0.0
    """Seconds before it."""
    duration: float | None = None
    """Seconds of it; to the end of the file if None."""


@dataclass(frozen=True)
class Clip:
    """An audio file and what is said in it."""

    path: Path
    text: str
    name: str
    """File and row, for errors and logs."""
    duration: float | None = None
    """Seconds, as far as they are known without reading it."""
    key: str | None = None
    """Text that decides on the split, `text` if None."""
    segment: Segment = Segment()
    """The part of the file that it is."""


class Clips(MediaSamples):
    """A question about each clip, and its text as the answer."""

    def __init__(
        self,
        clips: Sequence[Clip],
        source: str,
        *,
        split: Split | None = None,
        question: str = QUESTION,
        max_seconds: float | None = None,
        max_samples: int = MAX_SAMPLES,
    ) -> None:
        """`max_samples` is that of `read_audio`: a clip with more counts as damaged."""
        super().__init__()
        if split is not None:
            check_split(split)
            clips = [clip for clip in clips if split_of(clip.key or clip.text) == split]
        if max_seconds is not None:
            clips = [clip for clip in clips if (clip.duration or 0.0) <= max_seconds]
        if not clips:
            raise ValueError(
                f"{source}: it must hold a clip with a text, got none for split={split!r} and "
                f"max_seconds={max_seconds}"
            )
        self.clips, self.question = list(clips), question
        self.max_samples = max_samples

    def __len__(self) -> int:
        return len(self.clips)

    def size(self, index: int) -> float | None:
        return self.clips[index].duration

    def waveform(self, clip: Clip) -> Tensor:
        """(samples,) of a clip.

        Raises:
            MediaError: it cannot be read.
        """
        segment = clip.segment
        return read_audio(
            clip.path,
            f"{clip.name}: {clip.path}",
            offset=segment.offset,
            duration=segment.duration,
            max_samples=self.max_samples,
        )

    def read(self, index: int) -> Sample:
        clip = self.clips[index]
        turns = (Turn((self.waveform(clip), self.question)), Turn((clip.text,), answer=True))
        return Sample(turns, clip.name)


class Manifest(Clips):
    """JSON lines with `audio_filepath`, `duration`, `text`; paths may be relative to the file.

    A row is `duration` seconds of its file, from `offset` seconds on if it has that key.
    """

    def __init__(
        self,
        path: str,
        *,
        split: Split | None = None,
        question: str = QUESTION,
        answer: str = "text",
        split_by: str | None = None,
        max_seconds: float | None = None,
        max_samples: int = MAX_SAMPLES,
    ) -> None:
        """
        Args:
            split: the part of the texts that is read, all of them if None.
            question: what the model is asked to do.
            answer: key of what it is to say, "translation" for one.
            split_by: key of the text that decides on the split, `answer` if None: one key for all
                tasks keeps clips that one of them holds out from the others.
            max_seconds: longer clips are left out.
            max_samples: a clip with more samples counts as damaged, whatever its row says.
        """
        clips = []
        for name, row in json_lines(path):
            file = need(name, row, "audio_filepath", str)
            text = need(name, row, answer, str)
            need(name, row, "duration", (int, float))
            segment = segment_of(name, row)
            if not text.strip():
                raise ValueError(f"{name}: {answer!r} must hold words, got {text!r}")
            audio_path = Path(path).parent / file
            if not audio_path.is_file():
                raise ValueError(f"{name}: audio_filepath {str(audio_path)!r} is not a file")
            key = need(name, row, split_by, str) if split_by is not None else None
            clips.append(Clip(audio_path, text, name, segment.duration, key, segment))
        super().__init__(
            clips, path, split=split, question=question, max_seconds=max_seconds,
            max_samples=max_samples,
        )  # fmt: skip


class LibriSpeechTree(Clips):
    """A folder with `*.trans.txt` files, "ID TEXT" in each line, and ID.flac (or wav) beside."""

    def __init__(
        self,
        root: str,
        *,
        split: Split | None = None,
        question: str = QUESTION,
        max_samples: int = MAX_SAMPLES,
    ) -> None:
        import soundfile

        if not Path(root).is_dir():
            raise ValueError(f"root must be a folder, got {root!r}, which is none")
        clips = []
        for script in sorted(Path(root).rglob("*.trans.txt")):
            for number, line in enumerate(script.read_text(encoding="utf-8").splitlines()):
                name = f"{script}: line {number}"
                key, _, text = line.strip().partition(" ")
                if not text:
                    raise ValueError(f"{name}: must be an id and a text, got {line!r}")
                files = [script.parent / f"{key}{suffix}" for suffix in SUFFIXES]
                file = next((file for file in files if file.is_file()), None)
                if file is None:
                    raise ValueError(f"{name}: {key} has no file among {', '.join(SUFFIXES)}")
                try:
                    seconds = soundfile.info(file).duration
                # A decoder raises whatever a damaged file leads it to.
                except Exception:
                    seconds = 0.0  # Skipped and named when it is read.
                clips.append(Clip(file, text.lower(), name, seconds))
        super().__init__(clips, root, split=split, question=question, max_samples=max_samples)


def json_lines(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with a name for errors; empty lines are passed over."""
    if not Path(path).is_file():
        raise ValueError(f"path must be a file of JSON lines, got {str(path)!r}, which is no file")
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines()):
        name = f"{path}: row {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            if not rows and line.strip().startswith((b"[", b"{")) and _is_json(path):
                raise ValueError(
                    f"{path}: must have a JSON object in every line, got one JSON value over "
                    "several lines"
                ) from error
            raise ValueError(f"{name}: not JSON: {error}") from error
        if isinstance(row, list) and not rows:
            raise ValueError(f"{name}: must have a JSON object in every line, got a JSON list")
        if not isinstance(row, dict):
            raise ValueError(f"{name}: must be an object, got {type(row).__name__}")
        rows.append((name, row))
    return rows


def _is_json(path: str) -> bool:
    try:
        json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def need(name: str, row: dict[str, Any], key: str, kind: Any) -> Any:
    """A field of a row that must be there and of its kind."""
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = getattr(kind, "__name__", "number")
        got = repr(value) if key in row else "nothing"
        raise ValueError(f"{name}: {key!r} must be a {wanted}, got {got}")
    return value


def segment_of(name: str, row: dict[str, Any]) -> Segment:
    """The part of an audio file that a row names by `offset` and `duration`, both in seconds.

    Raises:
        ValueError: one of them is no finite number, `offset` is below 0, or `duration` not above.
    """
    values = {}
    for key, default in (("offset", 0.0), ("duration", None)):
        value = row.get(key)
        if value is None:
            values[key] = default
            continue
        number = need(name, row, key, (int, float))
        if not math.isfinite(number) or number < 0 or (key == "duration" and not number):
            low = "at least 0" if key == "offset" else "positive"
            raise ValueError(f"{name}: {key!r} must be finite and {low}, got {number}")
        values[key] = float(number)
    return Segment(**values)
