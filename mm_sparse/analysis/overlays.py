"""Figures of what selections kept: over an image, over a spectrogram.

Maps of density by modality and by head are in `mm_sparse.analysis.heatmaps`.

B batch, K KV heads, T tiles, L list length, h x w grid of image tokens, A audio tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_sparse.modality import Modality
from mm_sparse.selection import Selection

Box = tuple[float, float, float, float]
"""Pixels (top, left, bottom, right) of an image."""


def kept_share(selection: Selection, tokens: Sequence[int], row: int = 0) -> Tensor:
    """Share of heads and of the query `tokens` that keep each key: (M,) float32 in [0, 1].

    Args:
        tokens: positions in the sequence, all among the queries.
        row: row of the batch.
    """
    plan = selection.plan
    if not 0 <= row < plan.layout.batch:
        raise ValueError(f"row must be in [0, {plan.layout.batch}), got {row}")
    first, last = plan.query_offset, plan.query_offset + plan.num_queries
    bad = [token for token in tokens if not first <= token < last]
    if bad or not len(tokens):
        raise ValueError(f"tokens must be one or more queries in [{first}, {last}), got {tokens!r}")
    start, size = plan.tiles[row].cpu().unbind(-1)
    units = plan.units[row].cpu().tolist()
    span = plan.span[row].cpu()
    index, count = selection.index[row].cpu(), selection.count[row].cpu()
    share = torch.zeros(plan.layout.length)
    order = plan.layout.order
    order = torch.arange(len(share)) if order is None else order[row % len(order)].cpu()
    place = order.argsort()
    for token in tokens:
        query = int(place[token]) - first
        inside = ((start <= query) & (query < start + size)).nonzero().flatten().tolist()
        low, high = span[query].tolist()
        for tile in inside:
            for head in range(index.shape[0]):
                for unit in index[head, tile, : int(count[head, tile])].tolist():
                    begin, length = units[unit]
                    share[max(begin, low) : max(min(begin + length, high), low)] += 1
    return share[place] / (len(tokens) * index.shape[0])


def kept_patches(
    selections: Mapping[str, Selection] | Selection,
    tokens: Sequence[int],
    image: Tensor,
    grid: tuple[int, int],
    path: str | Path | None = None,
    *,
    row: int = 0,
    start: int | None = None,
    title: str = "",
    asked: Box | None = None,
) -> dict[str, Tensor]:
    """Which patches of an image the query `tokens` kept, layer by layer, as a PNG.

    Queries that are patches of the image are outlined, and so is what was asked for.

    Args:
        selections: of one layer, or of several by name.
        tokens: positions of the queries in the sequence, a question's for one.
        image: (3, height, width) in [0, 1].
        grid: (h, w) image tokens of the image.
        path: where the drawing goes; None draws nothing.
        row: row of the batch.
        start: position of the image's first token; the row's first image token if None. With it,
            the image may be a frame of a video.
        title: text above: the question, what the model answers and what is true, for one.
        asked: pixels (top, left, bottom, right) of what a question asks for.
    Returns:
        By layer, (h, w): share of heads and of the given tokens that kept a patch.
    """
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be (3, height, width), got {tuple(image.shape)}")
    h, w = grid
    kept, first = _kept_of(selections, tokens, Modality.IMAGE, h * w, row, start, "grid")
    shares = {name: share.view(h, w) for name, share in kept.items()}
    if path is not None:
        own = query_boxes(tokens, first, grid, image)
        save(draw_patches(shares, image, title, queries=own, asked=asked), path)
    return shares


def query_boxes(
    tokens: Sequence[int], first: int, grid: tuple[int, int], image: Tensor
) -> list[Box]:
    """Pixels of those `tokens` that are patches of an image whose tokens begin at `first`."""
    h, w = grid
    high, wide = image.shape[-2] / h, image.shape[-1] / w
    places = [divmod(token - first, w) for token in tokens if 0 <= token - first < h * w]
    return [(r * high, c * wide, (r + 1) * high, (c + 1) * wide) for r, c in places]


def kept_frames(
    selections: Mapping[str, Selection] | Selection,
    tokens: Sequence[int],
    spectrogram: Tensor,
    count: int,
    path: str | Path | None = None,
    *,
    seconds: float | None = None,
    row: int = 0,
    start: int | None = None,
    title: str = "",
) -> dict[str, Tensor]:
    """Which audio tokens of an audio clip the query `tokens` kept, layer by layer, as a PNG.

    Queries that are tokens of the clip are marked by a line.

    Args:
        spectrogram: (bins, frames) of the clip, low notes first.
        count: A, audio tokens of the clip.
        seconds: length of the clip, for the axis.
        start: position of the clip's first token; the row's first audio token if None.
    The other arguments are those of `kept_patches`.

    Returns:
        By layer, (A,): share of heads and of the given tokens that kept an audio token.
    """
    if spectrogram.dim() != 2:
        raise ValueError(f"spectrogram must be (bins, frames), got {tuple(spectrogram.shape)}")
    shares, first = _kept_of(selections, tokens, Modality.AUDIO, count, row, start, "count")
    if path is not None:
        own = [token - first for token in tokens if 0 <= token - first < count]
        save(draw_frames(shares, spectrogram, seconds, title, queries=own), path)
    return shares


def _kept_of(
    selections: Mapping[str, Selection] | Selection, tokens: Sequence[int], kind: Modality,
    count: int, row: int, start: int | None, what: str,
) -> tuple[dict[str, Tensor], int]:  # fmt: skip
    """By layer, the shares of the `count` tokens of an image or clip; where these begin."""
    if isinstance(selections, Selection):
        selections = {"attention": selections}
    if not selections:
        raise ValueError("selections must hold at least one layer, got none")
    shares: dict[str, Tensor] = {}
    first = 0
    for name, selection in selections.items():
        layout = selection.plan.layout
        if start is not None:
            first = start
        else:
            positions = (layout.modality[row] == int(kind)).nonzero()
            if not len(positions):
                wanted = "n image" if kind == Modality.IMAGE else "n audio clip"
                raise ValueError(f"selections must be of a row with a{wanted}, row {row} has none")
            first = int(positions[0])
        if not 0 <= first <= layout.length - count:
            raise ValueError(
                f"start and {what} must lie in {layout.length} tokens, got {first} and {count}"
            )
        shares[name] = kept_share(selection, tokens, row)[first : first + count]
    return shares, first


def save(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure; the folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_patches(
    shares: Mapping[str, Tensor], image: Tensor, title: str = "", *,
    queries: Sequence[Box] = (), asked: Box | None = None,
) -> Any:  # fmt: skip
    """A matplotlib figure of the shares (h, w) over the image.

    Args:
        queries: pixels of query patches: outlined in cyan.
        asked: pixels of what a question asks for: outlined in green.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    pixels: Any = image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(3.2 * (len(shares) + 1), 3.8), layout="constrained")
    axes = figure.subplots(1, len(shares) + 1, squeeze=False)[0]
    axes[0].imshow(pixels)
    notes = [
        "image",
        *(["cyan: the query"] if queries else []),
        *(["green: asked for"] if asked is not None else []),
    ]
    axes[0].set_title("; ".join(notes), fontsize="small")
    for axis, (name, share) in zip(axes[1:], shares.items(), strict=True):
        axis.imshow(pixels)
        shade = axis.imshow(
            share.numpy(), cmap="magma", alpha=0.6, vmin=0, vmax=1, extent=(0, width, height, 0),
            interpolation="nearest",
        )  # fmt: skip
        axis.set_title(f"{name}: {float(share.mean()):.0%} kept", fontsize="small")
        if axis is axes[-1]:
            figure.colorbar(shade, ax=axis, shrink=0.7, label="share of heads and tokens")
    outlines = [(box, "cyan") for box in queries]
    outlines += [] if asked is None else [(asked, "lime")]
    for axis in axes:
        axis.set_axis_off()
        # A dark line below the bright one: seen on any image.
        for (top, left, bottom, right), color in outlines:
            for width, shade in ((4.0, "black"), (2.0, color)):
                axis.add_patch(
                    Rectangle(
                        (left - 0.5, top - 0.5), right - left, bottom - top, fill=False,
                        edgecolor=shade, linewidth=width, clip_on=False,
                    )
                )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def draw_frames(
    shares: Mapping[str, Tensor], spectrogram: Tensor, seconds: float | None = None,
    title: str = "", *, queries: Sequence[int] = (),
) -> Any:  # fmt: skip
    """A matplotlib figure of the shares (A,) over the spectrogram, a strip for every layer.

    `queries` are audio tokens of the clip that asked: a cyan line marks each.
    """
    from matplotlib.figure import Figure

    clip: Any = spectrogram.detach().float().cpu().numpy()
    end = float(clip.shape[1] if seconds is None else seconds)
    figure = Figure(figsize=(9, 1.5 + 1.3 * len(shares)), layout="constrained")
    axes = figure.subplots(len(shares) + 1, 1, squeeze=False, sharex=True)[:, 0]
    box = (0, end, 0, clip.shape[0])
    axes[0].imshow(clip, origin="lower", aspect="auto", cmap="gray_r", extent=box)
    axes[0].set_ylabel("mel bin", fontsize="small")
    shade = None
    for axis, (name, share) in zip(axes[1:], shares.items(), strict=True):
        axis.imshow(clip, origin="lower", aspect="auto", cmap="gray_r", extent=box)
        shade = axis.imshow(
            share[None].numpy(), cmap="magma", alpha=0.6, vmin=0, vmax=1, extent=box,
            aspect="auto", interpolation="nearest",
        )  # fmt: skip
        axis.set_yticks([])
        axis.set_title(f"{name}: {float(share.mean()):.0%} kept", fontsize="small", loc="left")
        for query in queries:
            axis.axvline((query + 0.5) * end / len(share), color="cyan", linewidth=1.5)
    if queries:
        axes[0].set_title("cyan line: the query", fontsize="small", loc="left")
    axes[-1].set_xlabel("frames" if seconds is None else "seconds")
    if shade is not None:
        figure.colorbar(shade, ax=list(axes[1:]), label="share of heads\nand tokens")
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure
