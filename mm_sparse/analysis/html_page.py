"""One HTML page for a model and a sample: what it read, what its layers kept."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse.analysis.heatmaps import draw_heads, draw_modalities
from mm_sparse.analysis.layer_report import Report, report
from mm_sparse.analysis.overlays import (
    Box,
    draw_frames,
    draw_patches,
    kept_frames,
    kept_patches,
    kept_share,
    query_boxes,
)
from mm_sparse.integrations import AttentionCall, capture_attention
from mm_sparse.selection import Selection

LAYERS = 4
"""Layers that are drawn over an image or an audio clip, spread evenly over the model."""
EDGE = 12
"""Tokens that are shown at either end of a long run that no head kept."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1f }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
img { max-width: 100% } table { border-collapse: collapse; font-size: 0.85rem }
td, th { padding: 0.2rem 0.7rem; text-align: left; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
p.tokens { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; max-height: 26rem;
           overflow: auto; border: 1px solid #ddd; padding: 0.4rem }
p.tokens mark { background: none; outline: 2px solid #d6246e }
dt { font-weight: 600 } dd { margin: 0 0 0.6rem 0; white-space: pre-wrap }
"""


NOTES = {
    "kept": "What the queries kept: shares of heads and of query tokens, layer by layer.",
    "modalities": "Kept over visible query-key pairs, mean over the layers that ran sparse.",
    "heads": "Kept over visible query-key pairs of each layer and KV head.",
    "tokens": "The darker a token, the more heads kept it. The query is outlined.",
}


@dataclass(frozen=True, eq=False)
class ImageView:
    """An image of the sample: where its tokens begin, and their grid."""

    pixels: Tensor
    """(3, height, width) in [0, 1]."""
    start: int
    grid: tuple[int, int]
    asked: Box | None = None
    """Pixels (top, left, bottom, right) of what a question asks for: outlined."""


@dataclass(frozen=True, eq=False)
class AudioView:
    """An audio clip of the sample: where its tokens begin, and how many there are."""

    spectrogram: Tensor
    """(bins, frames)."""
    start: int
    count: int
    seconds: float


@dataclass(frozen=True, eq=False)
class InspectionSample:
    """A sparsified model and a sample of one row."""

    title: str
    parts: Mapping[str, nn.Module]
    """Sparsified parts by name; the one called "language", or else the first, reads the sample."""
    run: Callable[[], object]
    """One forward pass."""
    queries: Sequence[int]
    """Positions whose keys are drawn: those of a question, for one."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Headings and texts that stand on top."""
    images: Sequence[ImageView] = ()
    audio: Sequence[AudioView] = ()
    caption: str = ""
    """Title of the figures: question, the model's answer and the true one, for one."""
    words: Sequence[str] = ()
    """Every token of the row as text: the page shows which of them were kept."""


def draw_sample(sample: InspectionSample) -> dict[str, Any]:
    """Run the sample once, without gradients; matplotlib figures by name."""
    return _figures(sample, _run(sample))


def _run(sample: InspectionSample) -> dict[str, Selection]:
    """What layers kept, by name: of `LAYERS` layers that ran sparse."""
    if not sample.parts:
        raise ValueError("parts must hold a sparsified model, got none")
    reader = "language" if "language" in sample.parts else next(iter(sample.parts))
    kept: dict[str, Selection] = {}

    def keep(call: AttentionCall) -> None:
        if call.selection is not None:
            kept[call.name] = call.selection

    with torch.no_grad(), capture_attention(sample.parts[reader], keep):
        sample.run()
    return {name: kept[name] for name in _spread(list(kept), LAYERS)}


def _figures(sample: InspectionSample, chosen: Mapping[str, Selection]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for number, image in enumerate(sample.images if chosen else ()):
        shares = kept_patches(chosen, sample.queries, image.pixels, image.grid, start=image.start)
        figures[f"image-{number + 1}"] = draw_patches(
            shares, image.pixels, sample.caption, asked=image.asked,
            queries=query_boxes(sample.queries, image.start, image.grid, image.pixels),
        )  # fmt: skip
    for number, clip in enumerate(sample.audio if chosen else ()):
        mel = clip.spectrogram
        shares = kept_frames(chosen, sample.queries, mel, clip.count, start=clip.start)
        own = [q - clip.start for q in sample.queries if 0 <= q - clip.start < clip.count]
        figures[f"audio-{number + 1}"] = draw_frames(
            shares, mel, clip.seconds, sample.caption, queries=own
        )
    for name, part in sample.parts.items():
        own = report(part)
        ran = [row for row in own.rows if row.mode == "sparse" and row.density is not None]
        if not ran:
            continue
        # Of a text, a map of one colour says nothing that the table of layers does not say.
        if not sample.words or any(len(row.pair_density or {}) > 1 for row in ran):
            figures[f"{name}-modalities"] = draw_modalities(own)
        heads = [density for row in ran for density in row.head_density]
        if not sample.words or max(heads) - min(heads) > 0.005:
            figures[f"{name}-heads"] = draw_heads(own)
    return figures


def write_page(sample: InspectionSample, path: str | Path) -> Path:
    """Draw the sample into one HTML file; its figures lie inside it."""
    body = [f"<h1>{html.escape(sample.title)}</h1>", _texts(sample.texts)]
    chosen = _run(sample)
    if sample.words and chosen:
        body.append(f"<h2>Kept tokens</h2><p>{NOTES['tokens']}</p>")
        body += [_shaded(name, selection, sample) for name, selection in chosen.items()]
    for name, figure in _figures(sample, chosen).items():
        title, _, kind = name.replace("-", " ", 1).partition(" ")
        note = NOTES.get(kind, NOTES["kept"])
        body.append(f"<h2>{html.escape(title.capitalize())} {kind}</h2><p>{note}</p>")
        body.append(_figure(figure))
    for name, part in sample.parts.items():
        body.append(f"<h2>Layers of {html.escape(name)}</h2>{_table(report(part))}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f'<meta charset="utf-8"><title>{html.escape(sample.title)}</title>'
    page = f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>'
    path.write_text(page + "\n".join(body) + "</body></html>\n", encoding="utf-8")
    return path


def _spread(names: list[str], count: int) -> list[str]:
    if len(names) <= count:
        return names
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def _texts(texts: Mapping[str, str]) -> str:
    lines = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in texts.items())
    return f"<dl>{''.join(lines)}</dl>"


def _shaded(name: str, selection: Selection, sample: InspectionSample) -> str:
    """The tokens that a layer's queries see, shaded by the share of heads that kept each."""
    shares = kept_share(selection, sample.queries).tolist()
    if len(sample.words) != len(shares):
        raise ValueError(
            f"words must hold the {len(shares)} tokens of the row, got {len(sample.words)}"
        )
    seen = max(sample.queries) + 1
    kept = sum(shares[:seen]) / seen
    pieces: list[str] = []
    # Neighbours of one share are one element: units are kept or dropped as a whole.
    for share, run in groupby(range(seen), key=shares.__getitem__):
        places = list(run)
        words = [_word(sample.words[place], place in sample.queries) for place in places]
        hidden = len(words) - 2 * EDGE
        if share == 0 and hidden > EDGE and not set(places) & set(sample.queries):
            note = f"<i> [{hidden} more that no head kept] </i>"
            words = [*words[:EDGE], note, *words[-EDGE:]]
        dark = ";color:#fff" if share > 0.6 else ""
        style = f"background:rgba(30,80,160,{0.85 * share:.2f}){dark}"
        pieces.append(f'<span title="{share:.0%}" style="{style}">{"".join(words)}</span>')
    return f'<h3>{html.escape(name)}: {kept:.0%} kept</h3><p class="tokens">{"".join(pieces)}</p>'


def _word(word: str, outlined: bool) -> str:
    return f"<mark>{html.escape(word)}</mark>" if outlined else html.escape(word)


def _figure(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    code = base64.b64encode(file.getvalue()).decode()
    return f'<p><img alt="" src="data:image/png;base64,{code}"></p>'


def _table(report: Report) -> str:
    names = ("layer", "mode", "queries", "keys", "density", "")
    lines = ["".join(f"<th>{name}</th>" for name in names)]
    for row in report.rows:
        numbers = [
            "" if value is None else str(value)
            for value in (row.queries, row.keys, row.density and f"{row.density:.3f}")
        ]
        cells = [f"<td>{html.escape(row.name)}</td><td>{row.mode}</td>"]
        cells += [f'<td class="number">{number}</td>' for number in numbers]
        lines.append("".join([*cells, f"<td>{html.escape(row.reason)}</td>"]))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
