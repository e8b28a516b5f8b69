"""The two figures of the README, drawn from the JSON files in docs/results/data.

python docs/figures.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "results" / "data"
INK, GREY, BLUE, ORANGE, GREEN = "#1f2933", "#7b8794", "#1769aa", "#c2570c", "#2f855a"
SIZE = (5.4, 4.1)


def read(name: str) -> Any:
    """A JSON file of the data folder."""
    return json.loads((DATA / name).read_text())


def times(records: list[dict[str, Any]], what: str) -> dict[int, float]:
    """Milliseconds by length: 16 heads of 128, not causal, forward; the fastest of what matches."""
    found: dict[int, float] = {}
    for r in records:
        shape = (r["heads"], r["head_dim"], r["causal"], r["direction"])
        if shape == ("16/16", 128, False, "forward") and r["what"].startswith(what):
            found[r["tokens"]] = min(r["milliseconds"], found.get(r["tokens"], float("inf")))
    return found


def speed(path: Path) -> None:
    """Time of a forward over the length, and how much faster than the fastest dense attention."""
    from matplotlib.figure import Figure

    short = read("break-even-h100.json")["records"]
    long = read("attend-h100.json")
    # Lengths up to 8192 are of the first file's run, later ones of the second file's runs.
    records = [r for r in short if r["tokens"] <= 8192]
    records += long["16384 tokens"]["records"] + long["65536 tokens"]["records"]
    middle = [r for r in short if r["tokens"] == 32768]
    lines = {
        "dense FlashAttention-2": (times(records + middle, "dense sdpa flash"), GREY),
        "dense cuDNN": (times(records + middle, "dense sdpa cudnn"), ORANGE),
        "mm-sparse, 20 % of the keys": (times(records, "score + select + attend unit 64"), BLUE),
    }
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    for points, color in lines.values():
        width = 2.6 if color == BLUE else 1.8
        axis.plot(
            *zip(*sorted(points.items()), strict=True), color=color, lw=width, marker="o", ms=4
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    lengths = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
    axis.set_yticks(
        [0.03, 0.1, 0.3, 1, 3, 10, 30, 100], ["0.03", "0.1", "0.3", "1", "3", "10", "30", "100"]
    )
    axis.minorticks_off()
    axis.set_ylim(0.018, 330)
    axis.set_xlim(900, 82000)
    newest = times(records, "dense flash-attn-4")
    axis.plot(*zip(*sorted(newest.items()), strict=True), color=GREEN, lw=0, marker="D", ms=5)
    notes = (
        ("dense\nFlashAttention-2", 190, GREY),
        ("dense cuDNN", 66, ORANGE),
        ("dense flash-attn-4", 38, GREEN),
        ("mm-sparse,\n20 % of the keys", 12, BLUE),
    )
    for text, height, color in notes:
        axis.annotate(
            text, (78000, height), color=color, va="center", fontsize=9.5, fontweight="bold"
        )
    mine = lines["mm-sparse, 20 % of the keys"][0]
    dense = [lines["dense FlashAttention-2"][0], lines["dense cuDNN"][0], newest]
    for n in (4096, 8192, 16384, 65536):
        fastest = min(points[n] for points in dense if n in points)
        axis.plot((n, n), (mine[n], fastest), color=INK, lw=1.2, zorder=1)
        axis.annotate(
            f"{fastest / mine[n]:.1f} x", (n * 1.04, mine[n] * (0.6 if n < 60000 else 0.42)),
            color=INK, fontsize=10.5,
            fontweight="bold", va="center", ha="left" if n < 60000 else "center",
        )  # fmt: skip
    axis.set_xlim(900, 420000)
    _finish(axis, "Attention, forward: x faster than the fastest dense", "tokens", "milliseconds")
    detail = "one H100, bf16, 16 heads of 128, scoring and selection included"
    axis.text(0, 1.01, detail, transform=axis.transAxes, fontsize=8.5, color=GREY)
    _save(figure, path)


def quality(path: Path) -> None:
    """KL to the dense model over density, by method."""
    from matplotlib.figure import Figure

    data = read("smollm2-quality-h100.json")
    rows = [r for part in ("text", "density") for r in data[part]["rows"] if r["text"] == "text"]
    names = {
        "window": ("sliding window\n+ sinks", GREY, 1.15),
        "pooled": ("untrained\nscores", ORANGE, 0.93),
        "one ratio": ("trained scorers,\none ratio", GREEN, 1.0),
        "scorers": ("trained scorers,\nbudgets by head", BLUE, 1.0),
    }
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    last = {}
    for method, (name, color, shift) in names.items():
        points = sorted((r["density"], r["kl"]) for r in rows if r["method"] == method)
        width = 2.6 if color == BLUE else 1.8
        axis.plot(*zip(*points, strict=True), color=color, lw=width, marker="o", ms=4)
        last[method] = points[-1]
        place = (0.206, points[-1][1] * shift)
        axis.annotate(name, place, color=color, va="center", fontsize=9.5, fontweight="bold")
    axis.set_yscale("log")
    axis.set_yticks(
        [0.01, 0.02, 0.05, 0.1, 0.2, 0.3], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.3"]
    )
    axis.minorticks_off()
    axis.set_ylim(0.0095, 0.36)
    axis.set_xlim(0.095, 0.258)
    axis.set_xticks([0.1, 0.15, 0.2], ["10 %", "15 %", "20 %"])
    low, high = last["scorers"][1], last["pooled"][1]
    axis.plot((0.1995, 0.1995), (low, high), color=INK, lw=1.2, zorder=1)
    axis.annotate(
        f"{high / low:.1f} x less", (0.197, (low * high) ** 0.5 * 0.8), color=INK, fontsize=10,
        fontweight="bold", ha="right", va="center",
    )  # fmt: skip
    _finish(
        axis,
        "What is lost: SmolLM2-135M, 8192 tokens of text",
        "keys kept",
        "KL to dense, nats (lower is better)",
    )
    detail = "mean of eight texts that nothing was trained on, second half scored"
    axis.text(0, 1.01, detail, transform=axis.transAxes, fontsize=8.5, color=GREY)
    _save(figure, path)


def _finish(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=11.5, color=INK, loc="left", fontweight="bold", pad=16)
    axis.set_xlabel(x, color=INK)
    axis.set_ylabel(y, color=INK)
    axis.grid(True, color="#e4e7eb", lw=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=160, facecolor="white")
    print(path)


def main() -> None:
    """Both figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA)
    out = parser.parse_args().out
    speed(out / "readme-speed.png")
    quality(out / "readme-quality.png")


if __name__ == "__main__":
    main()
