"""Fetch real human speech from Debian packages and write manifests: an opt-in set-up.

    # needs apt-get and dpkg-deb
    python -m mm_sparse.recipes.datasets.debian_speech --out data/speech
    python -m mm_sparse.recipes.datasets.debian_speech --out data/speech --only prompts

prompts: one speaker's English telephone prompts, 8 kHz (asterisk-core-sounds-en, CC-BY-SA);
dialogue: acted Czech and Dutch dialogue with its English lines for translation (fillets-ng, GPL-2);
captions: spoken English captions of the Tux Paint stamps (tuxpaint-stamps-default, GPL-2).
The packages are unpacked below the folder; nothing is installed. Every line of a manifest has
audio_filepath, duration, text, language, and for dialogue translation.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm_sparse.recipes.datasets.asterisk_prompts import listed_prompts

SETS = {
    "prompts": ("asterisk-core-sounds-en", "asterisk-core-sounds-en-wav"),
    "dialogue": ("fillets-ng-data", "fillets-ng-data-cs", "fillets-ng-data-nl"),
    "captions": ("tuxpaint-stamps-default",),
}
Clip = tuple[Path, dict[str, str]]
DIALOGUE = re.compile(
    r'dialogId\(\s*"([^"]+)"\s*,\s*"[^"]*"\s*,\s*"((?:\\.|[^"\\])*)"\s*\)'
    r'\s*dialogStr\(\s*"((?:\\.|[^"\\])*)"\s*\)'
)


def fetch(packages: tuple[str, ...], root: Path) -> None:
    """Download packages and unpack them below `root`, those that are not there."""
    cache = root / "packages"
    cache.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not list(cache.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=cache, check=True)
        (file,) = cache.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(file), str(root)], check=True)


def prompts(root: Path) -> Iterator[Clip]:
    """The list beside the clips names each and says its text; remarks stand in brackets."""
    listing = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    folder = root / "usr/share/asterisk/sounds/en_US_f_Allison"
    for name, text in listed_prompts(listing):
        yield folder / f"{name}.wav", {"text": text, "language": "en"}


def dialogue(root: Path) -> Iterator[Clip]:
    """Subtitles in Lua, one file per level and language, and an audio clip for each."""
    game = root / "usr/share/games/fillets-ng"
    for language in ("cs", "nl"):
        for script in sorted((game / "script").glob(f"*/*dialogs_{language}.lua")):
            for match in DIALOGUE.finditer(script.read_text(encoding="utf-8")):
                name, english, text = (part.replace('\\"', '"') for part in match.groups())
                file = game / "sound" / script.parent.name / language / f"{name}.ogg"
                yield file, {"text": text, "translation": english, "language": language}


def captions(root: Path) -> Iterator[Clip]:
    """The first line of a stamp's text, and NAME_desc.ogg that speaks it."""
    for text in sorted((root / "usr/share/tuxpaint/stamps").rglob("*.txt")):
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and lines[0].strip():
            file = text.with_name(f"{text.stem}_desc.ogg")
            yield file, {"text": lines[0].strip(), "language": "en"}


READERS = {"prompts": prompts, "dialogue": dialogue, "captions": captions}


def write(name: str, root: Path, path: Path) -> tuple[int, float]:
    """The manifest of a set; how many clips and hours it has."""
    import soundfile

    rows: list[dict[str, Any]] = []
    for file, texts in READERS[name](root):
        if not file.is_file() or not all(text.strip() for text in texts.values()):
            continue
        try:
            seconds = soundfile.info(file).duration
        except soundfile.SoundFileError as error:
            print(f"left out: {file}: {error}")
            continue
        if seconds > 0:
            rows.append({"audio_filepath": str(file.resolve()), "duration": seconds, **texts})
    if not rows:
        raise ValueError(f"{root} must hold the packages {SETS[name]}, found no clip of {name}")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows), sum(row["duration"] for row in rows) / 3600


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--out", type=Path, default=Path("data/speech"))
    parser.add_argument("--only", choices=SETS, help="one set instead of all")
    parser.add_argument("--root", type=Path, help="where packages are unpacked: nothing is fetched")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else SETS:
        root = options.root or options.out
        if options.root is None:
            fetch(SETS[name], root)
        path = options.out / f"{name}.jsonl"
        count, hours = write(name, root, path)
        print(f"{path}: {count} clips, {hours:.2f} hours")


if __name__ == "__main__":
    main()
