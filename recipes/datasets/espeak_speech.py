"""Sentences spoken by espeak-ng, with a manifest: synthetic speech to train on, never to score.

    apt-get install espeak-ng wordnet-base
    python -m mm_sparse.recipes.datasets.espeak_speech --out data/speech --clips 8000

Sentences are the examples in WordNet's entries; `--texts` adds those of a manifest (Asterisk's
prompts, say), of the training split only. So no text of a held-out split is ever spoken.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from mm_sparse.recipes.data import json_lines, need, split_of
from mm_sparse.recipes.datasets.prepare_audio import spoken

QUOTED = re.compile(r'"([^"]+)"')
PLAIN = re.compile(r"[A-Za-z][A-Za-z ,.'?!-]*")


def examples(folder: Path, least: int = 3, most: int = 14) -> Iterator[str]:
    """Quoted examples of WordNet's files, of `least` to `most` words of plain letters."""
    for path in sorted(folder.glob("data.*")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            for text in QUOTED.findall(line.partition(" | ")[2]):
                text = text.strip()
                if PLAIN.fullmatch(text) and least <= len(text.split()) <= most:
                    yield text


def speak(texts: list[str], out: Path, clips: int, seed: int) -> float:
    """Write `clips` of them as Ogg and `out`/synthetic-SEED.jsonl; how many hours these are."""
    import soundfile

    folder = out / f"synthetic-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    rows, sayings = [], spoken(texts, seed)
    for number in range(clips):
        samples, text = next(sayings)
        file = folder / f"{number:05d}.ogg"
        soundfile.write(file, samples, 16000, compression_level=1.0)
        row = {"audio_filepath": f"{folder.name}/{file.name}", "duration": len(samples) / 16000}
        rows.append({**row, "text": text, "language": "en"})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    folder.with_suffix(".jsonl").write_text(lines)
    return sum(row["duration"] for row in rows) / 3600


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--out", type=Path, default=Path("data/speech"))
    parser.add_argument("--clips", type=int, default=8000)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--texts", type=Path, help="a manifest whose texts are spoken as well")
    parser.add_argument("--times", type=int, default=5, help="how often each of `texts` counts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    texts = list(examples(options.wordnet))
    if options.texts is not None:
        rows = json_lines(str(options.texts))
        texts += [need(name, row, "text", str) for name, row in rows] * options.times
    texts = [text for text in texts if split_of(text) == "train"]
    if not texts:
        parser.error(f"argument --wordnet: must hold data.* files, found none in {options.wordnet}")
    hours = speak(texts, options.out, options.clips, options.seed)
    print(f"{options.clips} clips, {hours:.2f} hours of synthetic speech, {len(texts)} texts")


if __name__ == "__main__":
    main()
