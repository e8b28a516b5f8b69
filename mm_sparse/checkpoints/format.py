"""Scorers on disk: safetensors for the weights, JSON for the config and what each layer has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_sparse.config import SparseConfig
from mm_sparse.integrations import SparseLayer, device_of, scorer_shape
from mm_sparse.scorers import PooledScorer, Scorer, scorer_class

WEIGHTS, RECORD = "scorers.safetensors", "scorers.json"
_SHAPE = ("num_query_heads", "num_kv_heads", "head_dim")


def write_scorers(
    layers: dict[str, SparseLayer],
    config: SparseConfig,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the scorers of the layers that may run sparse, their numbers in `dtype` if given.

    Weights that are sharded are gathered, so every process must call; the first one writes.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    sharded = False
    entries: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        if layer.known_mode()[0] != "sparse":
            continue
        scorer = layer.scorer or PooledScorer()
        for key, value in scorer.state_dict().items():
            if hasattr(value, "full_tensor"):
                value, sharded = value.full_tensor(), True
            stored = value.to(dtype if value.is_floating_point() else None)
            tensors[f"{name}:{key}"] = stored.detach().cpu().contiguous()
        entries[name] = {"scorer": type(scorer).__name__}
        entries[name] |= scorer.init_args()
    if sharded and torch.distributed.get_rank():
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    record = {"format": 1, "config": json.loads(config.to_json()), "layers": entries}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


@dataclass(frozen=True)
class StoredScorers:
    """What `write_scorers` wrote."""

    config: SparseConfig
    entries: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]

    def named_as(self, names: Sequence[str]) -> StoredScorers:
        """The same for a model of these layers, where they differ in what all names begin with.

        So scorers of a tower serve it bare and wrapped.
        """
        own = [*self.entries, *self.config.named_layers]
        if not self.entries or set(own) <= set(names):
            return self
        old, new = _stem(own), _stem(names)
        renamed = {name: new + name[len(old) :] for name in own}
        if not set(renamed.values()) <= set(names):
            return self
        config = self.config.with_layers_renamed(renamed)
        entries = {renamed[name]: entry for name, entry in self.entries.items()}
        parts = ((key.partition(":"), value) for key, value in self.tensors.items())
        return StoredScorers(
            config, entries, {f"{renamed[n]}:{key}": v for (n, _, key), v in parts}
        )

    def check_layers(self, names: Iterable[str]) -> None:
        """Refuse scorers of layers that a model with layers of these names does not have."""
        unknown = sorted(set(self.entries) - set(names))
        if unknown:
            raise ValueError(f"folder must hold scorers of the model's layers, got {unknown[0]}")

    def install(self, layers: dict[str, SparseLayer]) -> None:
        """Give the layers their scorers: all of them or, with an error, none."""
        self.check_layers(layers)
        made = {name: self._make(name, layers[name]) for name in self.entries}
        for name, scorer in made.items():
            layers[name].scorer = scorer

    def scorer_of(self, name: str, shape: tuple[int, int, int]) -> Scorer | None:
        """The scorer of a layer; None for the score without training.

        Args:
            name: of the layer, as in `entries`.
            shape: its query heads, KV heads and head dim.
        Raises:
            ValueError: it is of another shape, or of a class that nobody registered.
        """
        kind = self.entries[name]["scorer"]
        if kind == "PooledScorer":
            return None
        scorer = self._new(name, shape)
        if scorer is None:
            raise ValueError(f"folder must hold registered scorers, got a {kind} for {name}")
        scorer.load_state_dict(self._tensors_of(name))
        return scorer

    def _new(self, name: str, want: tuple[int, ...]) -> Scorer | None:
        """A scorer as a layer's entry has it, without its weights; None if its class is unknown."""
        entry = dict(self.entries[name])
        cls = scorer_class(entry.pop("scorer"))
        if cls is None:
            return None
        got = tuple(entry.get(field, size) for field, size in zip(_SHAPE, want, strict=True))
        if want != got:
            raise ValueError(
                f"folder must hold a scorer for {want} query heads, KV heads and head dim "
                f"of {name}, got {got}"
            )
        return cls.from_init_args(**entry)

    def _tensors_of(self, name: str) -> dict[str, Tensor]:
        return {k.partition(":")[2]: v for k, v in self.tensors.items() if k.startswith(name + ":")}

    def _make(self, name: str, layer: SparseLayer) -> Scorer | None:
        kind = self.entries[name]["scorer"]
        if kind == "PooledScorer":
            return None
        scorer, made = layer.scorer, self._new(name, scorer_shape(layer.module))
        if made is not None:
            scorer = made.to(device_of(layer))
        elif scorer is None or type(scorer).__name__ != kind:
            raise ValueError(
                f"model must be sparsified with a {kind} at {name} before loading, "
                f"got {type(scorer or PooledScorer()).__name__}"
            )
        scorer.load_state_dict(self._tensors_of(name))
        return scorer


def _stem(names: Sequence[str]) -> str:
    """What all dotted names begin with, whole parts of a name only and never all of one."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = takewhile(lambda parts: len(set(parts)) == 1, columns)
    return "".join(f"{parts[0]}." for parts in shared)


def read_scorers(folder: Path) -> StoredScorers:
    """Read the files of `folder`."""
    from safetensors.torch import load_file

    for file in (WEIGHTS, RECORD):
        if not (folder / file).is_file():
            raise ValueError(f"folder must hold {WEIGHTS} and {RECORD}, got {folder}, no {file}")
    record = json.loads((folder / RECORD).read_text())
    if record.get("format") != 1:
        raise ValueError(f"folder must hold scorers of format 1, got {record.get('format')!r}")
    config = SparseConfig.from_json(json.dumps(record["config"]))
    return StoredScorers(config, record["layers"], load_file(folder / WEIGHTS))
