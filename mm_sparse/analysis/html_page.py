"""One HTML page for a model and a sample: what it read, what its layers kept."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse.analysis.heatmaps import draw_heads, draw_modalities
from mm_sparse.analysis.layer_report import Report, report
from mm_sparse.analysis.overlays import draw_frames, draw_patches, kept_frames, kept_patches
from mm_sparse.integrations import AttentionCall, capture_attention
from mm_sparse.selection import Selection

LAYERS = 4
"""Layers that are drawn over a picture or a sound, spread evenly over the model."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1f }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
img { max-width: 100% } table { border-collapse: collapse; font-size: 0.85rem }
td, th { padding: 0.2rem 0.7rem; text-align: left; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
dt { font-weight: 600 } dd { margin: 0 0 0.6rem 0; white-space: pre-wrap }
"""


NOTES = {
    "kept": "What the queries kept: shares of heads and of query tokens, layer by layer.",
    "modalities": "Kept over visible query-key pairs, mean over the layers that ran sparse.",
    "heads": "Kept over visible query-key pairs of each layer and KV head.",
}


@dataclass(frozen=True, eq=False)
class ImageView:
    """A picture of the sample: where its tokens begin, and their grid."""

    pixels: Tensor
    """(3, height, width) in [0, 1]."""
    start: int
    grid: tuple[int, int]


@dataclass(frozen=True, eq=False)
class AudioView:
    """A sound of the sample: where its tokens begin, and how many there are."""

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
    sights: Sequence[ImageView] = ()
    sounds: Sequence[AudioView] = ()


def draw_scene(scene: InspectionSample) -> dict[str, Any]:
    """Run the scene once, without gradients; matplotlib figures by name."""
    if not scene.parts:
        raise ValueError("parts must hold a sparsified model, got none")
    reader = "language" if "language" in scene.parts else next(iter(scene.parts))
    kept: dict[str, Selection] = {}

    def keep(call: AttentionCall) -> None:
        if call.selection is not None:
            kept[call.name] = call.selection

    with torch.no_grad(), capture_attention(scene.parts[reader], keep):
        scene.run()
    chosen = {name: kept[name] for name in _spread(list(kept), LAYERS)}
    found: dict[str, Any] = {}
    for number, sight in enumerate(scene.sights if chosen else ()):
        shares = kept_patches(chosen, scene.queries, sight.pixels, sight.grid, start=sight.start)
        found[f"picture-{number + 1}"] = draw_patches(shares, sight.pixels)
    for number, sound in enumerate(scene.sounds if chosen else ()):
        mel = sound.spectrogram
        shares = kept_frames(chosen, scene.queries, mel, sound.count, start=sound.start)
        found[f"sound-{number + 1}"] = draw_frames(shares, mel, sound.seconds)
    for name, part in scene.parts.items():
        own = report(part)
        if any(row.mode == "sparse" and row.density is not None for row in own.rows):
            found[f"{name}-modalities"] = draw_modalities(own)
            found[f"{name}-heads"] = draw_heads(own)
    return found


def write_page(scene: InspectionSample, path: str | Path) -> Path:
    """Draw the scene into one HTML file; its pictures lie inside it."""
    body = [f"<h1>{html.escape(scene.title)}</h1>", _texts(scene.texts)]
    for name, figure in draw_scene(scene).items():
        title, _, kind = name.replace("-", " ", 1).partition(" ")
        note = NOTES.get(kind, NOTES["kept"])
        body.append(f"<h2>{html.escape(title.capitalize())} {kind}</h2><p>{note}</p>")
        body.append(_picture(figure))
    for name, part in scene.parts.items():
        body.append(f"<h2>Layers of {html.escape(name)}</h2>{_table(report(part))}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f'<meta charset="utf-8"><title>{html.escape(scene.title)}</title>'
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


def _picture(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    code = base64.b64encode(file.getvalue()).decode()
    return f'<p><img alt="" src="data:image/png;base64,{code}"></p>'


def _table(found: Report) -> str:
    names = ("layer", "mode", "queries", "keys", "density", "")
    lines = ["".join(f"<th>{name}</th>" for name in names)]
    for row in found.rows:
        numbers = [
            "" if value is None else str(value)
            for value in (row.queries, row.keys, row.density and f"{row.density:.3f}")
        ]
        cells = [f"<td>{html.escape(row.name)}</td><td>{row.mode}</td>"]
        cells += [f'<td class="number">{number}</td>' for number in numbers]
        lines.append("".join([*cells, f"<td>{html.escape(row.reason)}</td>"]))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
