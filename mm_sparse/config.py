"""What to keep: budgets, floors, tile and unit sizes, in one frozen record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from math import ceil, fsum
from statistics import fmean
from typing import Any, TypeAlias

from mm_sparse.modality import Modality

TILES = (64, 128)
UNITS = (16, 32, 64, 128)
COARSE = (1, 2, 4, 8, 16, 32, 64)
REDUCTIONS = ("mean", "max")
_FORMER_NAMES = {
    "mass": "top_p",
    "sampled": "sample_ratio",
    "coarse": "coarse_factor",
    "subpools": "query_pools",
    "grid_order": "patch_order",
}
# What a stored config says of the modalities that there were.
_KNOWN = "modalities"
IMAGE, VIDEO = Modality.IMAGE.name, Modality.VIDEO.name
BACKENDS = ("auto", "triton", "torch", "dense")
HeadRatio: TypeAlias = float | tuple[float, ...]
LayerRatio: TypeAlias = HeadRatio | Mapping[Modality, HeadRatio]


PRESETS: dict[str, dict[str, Any]] = {
    "text": {"ratio": 0.2, "tile": 128, "unit": 16, "query_pools": 7, "bidirectional": ()},
    "vision": {
        "ratio": 0.2, "tile": 64, "unit": 16, "causal": False, "sinks": 0, "window": 0,
        "sample_ratio": 0.5,
    },
    "audio": {"ratio": 0.2, "tile": 64, "unit": 16, "causal": False, "sinks": 0, "window": 0},
}  # fmt: skip
"""Settings of the scorers that ship, by kind of model."""


@dataclass(frozen=True)
class SparseConfig:
    """How a layer chooses the keys that its queries attend to.

    One budget applies: `top_p` if given, else `tokens` if given, else `ratio`. What `sinks`,
    `window` and `modality_floor` always keep counts towards it; it grows where they exceed it.
    """

    ratio: float = 0.2
    """Share of the visible keys that a tile keeps, in (0, 1]."""
    tokens: int | None = None
    """Number of keys that a tile keeps, instead of a share."""
    top_p: float | None = None
    """Share of the predicted attention mass that a tile keeps, in (0, 1], instead of `ratio`."""
    tile: int = 128
    """Rows (query tokens times query heads of a KV group) that share a list of keys: 64 or 128."""
    unit: int = 16
    """Key tokens that are kept or dropped together: 16, 32, 64 or 128."""
    causal: bool = True
    """Whether a token sees only what comes before it (an explicit span of a layout overrules)."""
    bidirectional: tuple[Modality, ...] = (Modality.IMAGE, Modality.VIDEO)
    """Modalities whose segments (an image, a frame of a video) see themselves in both directions
    inside causal sequences."""
    patch_order: bool = True
    """Whether tiles and units of an image are compact patches of its grid (8 x 8 and 4 x 4 tokens
    for 64 and 16) instead of runs along its rows, and those of a video compact in time, too
    (4 x 4 x 4 and 2 x 2 x 4). Only where the grid is known and every query sees all of the image,
    video or frame or none of it."""
    sinks: int = 64
    """First tokens of a document, always kept."""
    window: int = 128
    """Tokens next to a query, always kept: before it, or half on either side if it sees both."""
    modality_floor: float | Mapping[Modality, float] = 0.0
    """Least share of the budget for every modality in view, one number or one per modality. They
    add up to at most 1, where of IMAGE and VIDEO the larger counts."""
    sample_ratio: float = 0.0
    """Share of the budget, in [0, 1), that goes to an even sample of the units that are not among
    the best. It stands for all of them: their keys count as often as there are others for each."""
    coarse_factor: int = 1
    """Units that are ranked together first, as one, a power of two of at most 64; then the units of
    the best such runs compete alone. Ranking every unit (1) takes time that grows with the square
    of the length: from some 200,000 tokens on it is worth leaving out most of them."""
    coarse_budget: float = 4.0
    """Keys of the runs whose units compete, in budgets; 1 or more."""
    query_pools: int = 4
    """Query descriptors of a tile."""
    reduce: str = "mean"
    """How queries of a tile decide together: by their "mean" share of attention to a unit, or by
    the largest ("max"), so that one query with a sharp need is heard among many without."""
    dense_below: int | None = None
    """Run dense if fewer tokens are visible; None takes the measured length for the device."""
    dense_layers: tuple[int | str, ...] = ()
    """Layers that stay dense: of a decoder by index, of any model by the name in `report`."""
    layer_ratio: Mapping[int | str, LayerRatio] = field(default_factory=dict)
    """Ratio of single layers, by index or name, or ratios of their KV heads, or either by modality
    as in `query_ratio`; the others keep `ratio`."""
    head_ratio: tuple[float, ...] = ()
    """Ratios of the KV heads instead of `ratio`, one for each, where given."""
    query_ratio: Mapping[Modality, HeadRatio] = field(default_factory=dict)
    """Ratio of a tile by what its queries are, or ratios of the KV heads. A tile that holds any
    TEXT is one of TEXT. Those of modalities that are not named keep `head_ratio` or `ratio`."""
    backend: str = "auto"
    """"auto", "triton", "torch" (gathers on a CPU) or "dense"."""
    deterministic: bool | None = None
    """Whether gradients repeat bit for bit. False lets a Hopper GPU add those of keys and values up
    in any order, where that is faster (16-bit numbers, head dims 64 and 128, tiles of 128): up to
    four times as fast, for float32 sums in memory. None: True where each query head has keys of
    its own, False where heads share keys, whose sums are small.
    torch.use_deterministic_algorithms overrules."""

    def __post_init__(self) -> None:
        _between("ratio", self.ratio)
        if self.top_p is not None:
            _between("top_p", self.top_p)
        if self.tokens is not None:
            _count("tokens", self.tokens, least=1)
        _one_of("tile", self.tile, TILES)
        _one_of("unit", self.unit, UNITS)
        _one_of("reduce", self.reduce, REDUCTIONS)
        _one_of("backend", self.backend, BACKENDS)
        _count("sinks", self.sinks)
        _count("window", self.window)
        _count("query_pools", self.query_pools, least=1)
        _between("sample_ratio", self.sample_ratio, zero=True)
        if self.sample_ratio == 1 or (self.sample_ratio and self.top_p is not None):
            raise ValueError(
                "sample_ratio must leave a share of the budget to the best, and be 0 with top_p, "
                f"got {self.sample_ratio} with top_p={self.top_p}"
            )
        _one_of("coarse_factor", self.coarse_factor, COARSE)
        _number("coarse_budget", self.coarse_budget)
        if not 1 <= self.coarse_budget < float("inf"):
            raise ValueError(f"coarse_budget must be at least 1, got {self.coarse_budget!r}")
        if self.dense_below is not None:
            _count("dense_below", self.dense_below)
        for name in ("causal", "patch_order"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if not isinstance(self.deterministic, bool | None):
            raise TypeError(f"deterministic must be a bool or None, got {self.deterministic!r}")
        layers = _sequence("dense_layers", self.dense_layers, "ints or names")
        for layer in layers:
            if not isinstance(layer, str) or layer.isdecimal():
                _count("dense_layers", layer)
        object.__setattr__(self, "dense_layers", layers)
        kinds = _sequence("bidirectional", self.bidirectional, "modalities")
        object.__setattr__(
            self, "bidirectional", tuple(_modality("bidirectional", m) for m in kinds)
        )
        object.__setattr__(self, "layer_ratio", _ratios(self.layer_ratio))
        object.__setattr__(self, "head_ratio", _heads("head_ratio", self.head_ratio))
        object.__setattr__(self, "query_ratio", _by_modality("query_ratio", self.query_ratio))
        if len(self.head_counts) > 1:
            raise ValueError(
                "query_ratio must be for as many KV heads in every modality, and as head_ratio, "
                f"got {sorted(self.head_counts)}"
            )
        floors = self.floors()
        pictures = {Modality.IMAGE, Modality.VIDEO} & floors.keys()
        # Video was counted as IMAGE once: what was a floor of both is one of each.
        shares = [share for kind, share in floors.items() if kind not in pictures]
        if fsum([*shares, *sorted(floors[kind] for kind in pictures)[-1:]]) > 1:
            raise ValueError(
                f"modality_floor must add up to at most 1 over modalities, got {floors}"
            )
        for name in ("top_p", "sample_ratio", "modality_floor"):
            # They ask of all units, of which few are ranked.
            if (
                self.coarse_factor > 1
                and getattr(self, name)
                and (name != "modality_floor" or floors)
            ):
                raise ValueError(f"coarse_factor must be 1 with {name}, got {self.coarse_factor}")
        if isinstance(self.modality_floor, Mapping):
            object.__setattr__(self, "modality_floor", floors)

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        """Fields alone: another process has other hashes for the same names."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def _hash(self) -> int:
        """Found once: layouts look plans up by their config, several times in a call."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.modality_floor, Mapping):
            values["modality_floor"] = frozenset(self.modality_floor.items())
        values["query_ratio"] = frozenset(self.query_ratio.items())
        values["layer_ratio"] = frozenset(
            (layer, frozenset(own.items()) if isinstance(own, Mapping) else own)
            for layer, own in self.layer_ratio.items()
        )
        return hash(tuple(values.values()))

    def floors(self) -> dict[Modality, float]:
        """Least share of the budget by modality, zeros left out."""
        return dict(self._floors)

    @cached_property
    def _floors(self) -> dict[Modality, float]:
        given = self.modality_floor
        if not isinstance(given, Mapping):
            given = dict.fromkeys(Modality, given)
        floors = {_modality("modality_floor", m): share for m, share in given.items()}
        for share in floors.values():
            _between("modality_floor", share, zero=True)
        return {m: float(share) for m, share in floors.items() if share}

    def of_layer(self, index: int | None, name: str = "") -> SparseConfig:
        """The config of one layer: its own ratio is the ratio, or the mean of its heads'."""
        if not self.layer_ratio:
            return self
        own = None if index is None else self.layer_ratio.get(index)
        own = self.layer_ratio.get(name) if own is None else own
        if own is None:
            return replace(self, layer_ratio={})
        if isinstance(own, Mapping):
            return replace(self, head_ratio=(), query_ratio=own, layer_ratio={})
        mean, heads = (fmean(own), own) if isinstance(own, tuple) else (own, ())
        return replace(self, ratio=mean, head_ratio=heads, query_ratio={}, layer_ratio={})

    def ratios_of(self, kind: Modality | None) -> tuple[float, ...]:
        """Ratios of KV heads in tiles of a modality, one for each, or one number for all."""
        own = self.head_ratio or self.ratio if kind is None else self.query_ratio.get(kind)
        own = self.ratios_of(None) if own is None else own
        return own if isinstance(own, tuple) else (own,)

    @cached_property
    def head_counts(self) -> frozenset[int]:
        """How many KV heads `head_ratio` and `query_ratio` have ratios for, where by head."""
        given = [*self.query_ratio.values(), self.head_ratio]
        return frozenset(len(own) for own in given if isinstance(own, tuple) and own)

    @cached_property
    def ratio_table(self) -> tuple[tuple[float, ...], ...]:
        """`ratios_of` each modality, then of none; as many in each row."""
        rows = [self.ratios_of(kind) for kind in (*Modality, None)]
        heads = max(map(len, rows))
        return tuple(row if len(row) > 1 else row * heads for row in rows)

    def of_heads(self, part: int, parts: int) -> SparseConfig:
        """The config of some KV heads of a layer: number `part` of as many even `parts`."""

        def own(ratios: Any) -> Any:
            size = len(ratios) // parts if isinstance(ratios, tuple) else 0
            return ratios[part * size : (part + 1) * size] if size else ratios

        if not self.head_ratio and not self.query_ratio:
            return self
        by_kind = {kind: own(ratios) for kind, ratios in self.query_ratio.items()}
        return replace(self, head_ratio=own(self.head_ratio), query_ratio=by_kind)

    @property
    def largest_ratio(self) -> float:
        """The largest of `ratio_table`."""
        return max(map(max, self.ratio_table))

    @classmethod
    def preset(cls, kind: str, **changes: Any) -> SparseConfig:
        """Settings that were measured for a kind of model (docs/how-to/choose-settings.md).

        Args:
            kind: "text" for causal language models, "vision" for encoders of images, "audio" for
                encoders of audio.
            changes: fields that differ.
        Raises:
            ValueError: there is no such preset.
        """
        if kind not in PRESETS:
            raise ValueError(f"kind must be one of {(*PRESETS,)}, got {kind!r}")
        return cls(**{**PRESETS[kind], **changes})

    def for_candidates(self) -> SparseConfig:
        """The config of the first of two stages of selection: `coarse_budget` budgets."""
        more = self.coarse_budget
        return replace(
            self,
            coarse_factor=1,
            ratio=min(self.ratio * more, 1.0),
            head_ratio=_scaled(self.head_ratio, more),
            query_ratio=_scaled(self.query_ratio, more),
            tokens=None if self.tokens is None else ceil(self.tokens * more),
        )

    def for_best(self) -> SparseConfig:
        """The config of the best units alone: what `sample_ratio` leaves of the budgets."""
        share = 1 - self.sample_ratio
        return replace(
            self,
            ratio=self.ratio * share,
            head_ratio=_scaled(self.head_ratio, share),
            query_ratio=_scaled(self.query_ratio, share),
            tokens=None if self.tokens is None else max(round(self.tokens * share), 1),
            sample_ratio=0.0,
        )

    def scaled(self, ratio: float) -> SparseConfig:
        """The config that keeps `ratio`, with all its other budgets scaled alike."""
        _between("ratio", ratio)
        names = ("layer_ratio", "head_ratio", "query_ratio")
        scaled = {name: _scaled(getattr(self, name), ratio / self.ratio) for name in names}
        return replace(self, ratio=ratio, **scaled)

    def with_layers_renamed(self, renamed: Mapping[str, str]) -> SparseConfig:
        """The config of a model whose layers have other names: old names to new ones."""
        return replace(
            self,
            dense_layers=tuple(renamed.get(str(x), x) for x in self.dense_layers),
            layer_ratio={renamed.get(str(x), x): own for x, own in self.layer_ratio.items()},
        )

    @property
    def named_layers(self) -> frozenset[str]:
        """Layers that `dense_layers` and `layer_ratio` name."""
        return frozenset(x for x in (*self.dense_layers, *self.layer_ratio) if isinstance(x, str))

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives an equal config back."""
        record = asdict(self)
        record[_KNOWN] = [m.name for m in Modality]
        record["bidirectional"] = [m.name for m in self.bidirectional]
        record["dense_layers"] = list(self.dense_layers)
        if isinstance(self.modality_floor, Mapping):
            record["modality_floor"] = {m.name: s for m, s in self.modality_floor.items()}
        record["query_ratio"] = _named(self.query_ratio)
        record["layer_ratio"] = {layer: _named(own) for layer, own in self.layer_ratio.items()}
        return json.dumps(record)

    @classmethod
    def from_json(cls, text: str) -> SparseConfig:
        """Inverse of `to_json`; reads former names of fields too, and refuses unknown ones.

        What was written when video counted as IMAGE says of VIDEO what it says of IMAGE.
        """
        record: Any = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError(f"text must hold a JSON object, got {record!r}")
        record = {_FORMER_NAMES.get(name, name): value for name, value in record.items()}
        if VIDEO not in record.pop(_KNOWN, ()):
            _video_as_image(record)
        unknown = sorted(set(record) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"text must hold fields of SparseConfig only, got also {unknown}")
        return cls(**record)


def _video_as_image(record: dict[str, Any]) -> None:
    """Say of VIDEO what a record says of IMAGE."""
    kinds, floors = record.get("bidirectional", ()), record.get("modality_floor")
    if isinstance(kinds, list) and IMAGE in kinds and VIDEO not in kinds:
        record["bidirectional"] = [*kinds, VIDEO]
    if isinstance(floors, dict) and IMAGE in floors:
        record["modality_floor"] = {VIDEO: floors[IMAGE], **floors}


def _heads(name: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, Set):
        raise TypeError(f"{name} must be in the order of KV heads, got the set {value!r}")
    ratios = _sequence(name, value, "numbers")
    for ratio in ratios:
        _between(name, ratio)
    return tuple(float(ratio) for ratio in ratios)


def _head_ratio(name: str, value: Any, of: str) -> HeadRatio:
    """A ratio, or one of each KV head."""
    if isinstance(value, Mapping) and value:
        raise TypeError(f"{name} must have a ratio or one of each KV head for {of}, got {value!r}")
    if isinstance(value, Iterable) and not isinstance(value, str):
        heads = () if isinstance(value, Mapping) else _heads(name, value)
        if not heads:
            raise ValueError(f"{name} must have a ratio for {of}, got none")
        return heads
    _between(name, value)
    return float(value)


def _by_modality(name: str, value: Any, of: str = "") -> dict[Modality, HeadRatio]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must map modalities to ratios, got {value!r}")
    ratios = {}
    for key, own in value.items():
        kind = _modality(name, key)
        if kind in ratios:
            raise ValueError(f"{name} must name {of}{kind.name} once, got {value!r}")
        ratios[kind] = _head_ratio(name, own, f"{of}{kind.name}")
    return ratios


def _named(value: Any) -> Any:
    """Modalities by their names, as JSON has them."""
    return {m.name: own for m, own in value.items()} if isinstance(value, Mapping) else value


def _scaled(value: Any, factor: float) -> Any:
    """Ratios, however they are grouped, times a factor, and at most 1."""
    if isinstance(value, Mapping):
        return {key: _scaled(own, factor) for key, own in value.items()}
    if isinstance(value, tuple):
        return tuple(_scaled(own, factor) for own in value)
    return min(value * factor, 1.0)


def _ratios(value: Any) -> dict[int | str, LayerRatio]:
    if not isinstance(value, Mapping):
        raise TypeError(f"layer_ratio must map layers to ratios, got {value!r}")
    ratios: dict[int | str, LayerRatio] = {}
    for key, ratio in value.items():
        # JSON has no other keys than strings.
        layer: Any = int(key) if isinstance(key, str) and key.isdecimal() else key
        if not isinstance(layer, str):
            _count("layer_ratio", layer)
        if layer in ratios:
            raise ValueError(f"layer_ratio must name layer {layer} once, got {value!r}")
        if isinstance(ratio, Mapping) and ratio:
            kinds = ratios[layer] = _by_modality("layer_ratio", ratio, f"layer {layer}, ")
            heads = sorted({len(own) for own in kinds.values() if isinstance(own, tuple)})
            if len(heads) > 1:
                raise ValueError(
                    "layer_ratio must be for as many KV heads in every modality of layer "
                    f"{layer}, got {heads}"
                )
        else:
            ratios[layer] = _head_ratio("layer_ratio", ratio, f"layer {layer}")
    return ratios


def _modality(name: str, value: Any) -> Modality:
    if isinstance(value, (bool, float)):
        raise TypeError(f"{name} must name modalities, got {value!r}")
    try:
        return Modality[value] if isinstance(value, str) else Modality(value)
    except (KeyError, ValueError):
        names = ", ".join(m.name for m in Modality)
        raise ValueError(f"{name} must name modalities among {names}, got {value!r}") from None


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _between(name: str, value: Any, zero: bool = False) -> None:
    _number(name, value)
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        raise ValueError(f"{name} must be in {'[0' if zero else '(0'}, 1], got {value!r}")


def _count(name: str, value: Any, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _sequence(name: str, value: Any, what: str) -> tuple[Any, ...]:
    try:
        # Keys of a mapping may be numbers, too.
        values = None if isinstance(value, (str, Mapping)) else tuple(value)
    except TypeError:
        values = None
    if values is None:
        raise TypeError(f"{name} must be a sequence of {what}, got {value!r}")
    return values


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not isinstance(value, type(choices[0])) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
