"""Put sparse attention into an existing model, and take it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from mm_sparse.config import SparseConfig
from mm_sparse.integrations.call import Call
from mm_sparse.integrations.discovery import Found
from mm_sparse.integrations.hf.attention import NAME, HFLayer, register
from mm_sparse.integrations.hf.discovery import HFFound, dispatches, find_layers
from mm_sparse.integrations.hf.modality_tracker import ModalityTracker
from mm_sparse.integrations.layer import LAYER, Layer, Shared
from mm_sparse.integrations.scorers import NAMED, make_scorer
from mm_sparse.integrations.towers.adapter import TowerFound, TowerLayer, find_towers
from mm_sparse.integrations.towers.call_layout import Tower
from mm_sparse.integrations.towers.patch_order import OrderedBlocks, find_ordered_blocks
from mm_sparse.scorers.pooled import Scorer

M = TypeVar("M", bound=nn.Module)
STATE = "_mm_sparse"


@dataclass(eq=False)
class State:
    """What `sparsify` did to a model."""

    shared: Shared
    layers: dict[str, Layer]
    trackers: list[ModalityTracker]
    towers: list[Tower]
    blocks: list[OrderedBlocks]
    handles: list[Any] = field(default_factory=list)
    before: list[tuple[Any, str]] = field(default_factory=list)
    """Configs and the attention implementation that each named."""


def sparsify(
    model: M,
    config: SparseConfig | None = None,
    *,
    strict: bool = True,
    scorer: str | Callable[..., Scorer] | None = None,
) -> M:
    """Make a model attend sparsely; its weights and their names stay as they are.

    Served are models of transformers that dispatch through its attention interface, and the
    self-attention of timm, open_clip and torchaudio. Below `config.dense_below` tokens a layer runs
    as before. A tower is causal only where its own mask is; class and register tokens are kept.

    Args:
        model: a model of these libraries, or a module that contains some.
        config: what to keep; `SparseConfig()` if None.
        strict: refuse a layer that cannot be served; else it runs as before and `report` says so.
        scorer: None for the training-free score, "relevance" or "fine" for a `RelevanceScorer` or
            `FineScorer` per layer, or a class or function called with num_query_heads, num_kv_heads
            and head_dim. On a sparsified model None keeps the scorers that are there.
    Returns:
        The model itself.
    Raises:
        ValueError: a layer cannot be served; the message names it, its class and what is missing.
    """
    config = SparseConfig() if config is None else config
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, SparseConfig):
        raise TypeError(f"config must be a SparseConfig, got {type(config).__name__}")
    if not (scorer is None or scorer in NAMED or callable(scorer)):
        raise ValueError(f"scorer must be None, one of {(*NAMED,)} or a callable, got {scorer!r}")
    kept = {}
    if STATE in vars(model):
        kept = {name: layer.scorer for name, layer in state_of(model).layers.items()}
    previous = vars(model).get(STATE)
    if previous is not None:
        densify(model)
    try:
        state = _prepare(model, config, strict)
        for name, layer in state.layers.items():
            if layer.known_mode()[0] == "sparse":
                layer.scorer = make_scorer(layer, scorer, kept.get(name), strict)
    except ValueError:
        if previous is not None:
            _attach(model, previous)
        raise
    _attach(model, state)
    return model


def densify(model: M) -> M:
    """Undo `sparsify`: the model is as it was, and its scorers are gone unless they were saved."""
    state = vars(model).get(STATE)
    if state is None:
        return model
    for handle in state.handles:
        handle.remove()
    state.handles.clear()
    for config, name in state.before:
        config._attn_implementation_internal = name
    for blocks in state.blocks:
        blocks.detach()
    for layer in state.layers.values():
        layer.detach()
    del vars(model)[STATE]
    return model


@contextmanager
def sparse(model: M, config: SparseConfig | None = None, **options: Any) -> Iterator[M]:
    """`sparsify` around a block; afterwards the model is as before, sparse or not."""
    previous = vars(model).get(STATE)
    sparsify(model, config, **options)
    try:
        yield model
    finally:
        densify(model)
        if previous is not None:
            _attach(model, previous)


def config_of(model: nn.Module) -> SparseConfig:
    """The config of a sparsified model."""
    return state_of(model).shared.config


@contextmanager
def keeping(model: nn.Module, **changes: Any) -> Iterator[None]:
    """The same layers and scorers with other fields of their config, around a block."""
    shared = state_of(model).shared
    before, shared.config = shared.config, replace(shared.config, **changes)
    try:
        yield
    finally:
        shared.config = before


def layers(model: nn.Module) -> dict[str, Layer]:
    """The attention layers of a sparsified model by name."""
    return dict(state_of(model).layers)


def scorers(model: nn.Module) -> nn.ModuleDict:
    """The scorers of a sparsified model; "/" stands for "." in the names of layers."""
    found = {n: la.scorer for n, la in state_of(model).layers.items() if la.scorer is not None}
    return nn.ModuleDict({name.replace(".", "/"): scorer for name, scorer in found.items()})


def scorer_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What an optimizer trains when only scorers are trained."""
    return scorers(model).parameters()


@contextmanager
def given_modality(model: nn.Module, modality: Tensor) -> Iterator[None]:
    """Say what each position is where no ids do (`inputs_embeds`), or instead of them.

    Args:
        modality: (B, M) of `Modality` values, from the first token of the sequence on; tokens
            behind are what their ids say, or text.
    """
    if not isinstance(modality, Tensor) or modality.dim() != 2 or modality.is_floating_point():
        raise ValueError(f"modality must be a (batch, tokens) tensor of integers, got {modality!r}")
    trackers = state_of(model).trackers
    if not trackers:
        raise ValueError(f"model must hold a transformers model, got {type(model).__name__}")
    for tracker in trackers:
        tracker.given = modality
    try:
        yield
    finally:
        for tracker in trackers:
            tracker.given = None


@contextmanager
def watch(
    model: nn.Module, watcher: Callable[[Call], None], *, timed: bool = False
) -> Iterator[None]:
    """Call `watcher` after every attention call, with q, k, v, scores and selection.

    All of a call is in one order, that of `call.layout`: a picture with a known grid is in patch
    order (`Call` says how to get the model's order back). Scores carry their graph then. A layer
    under gradient checkpointing is called once more in the backward pass: gather there and losses
    count double.
    """
    shared = state_of(model).shared
    shared.watchers.append(watcher)
    before, shared.timed = shared.timed, timed or shared.timed
    try:
        yield
    finally:
        shared.watchers.remove(watcher)
        shared.timed = before


def state_of(model: nn.Module) -> State:
    state = vars(model).get(STATE)
    if state is None:
        raise ValueError(f"model must be sparsified, got a {type(model).__name__} that is not")
    return state


def find_all(model: nn.Module) -> list[Found]:
    """Attention layers of all libraries, in the order of the model's modules."""
    found: dict[str, Found] = {f.name: f for f in find_layers(model)}
    # To transformers, a tower that one of its models wraps has attention that does not dispatch.
    found.update((f.name, f) for f in find_towers(model))
    return [found[name] for name, _ in model.named_modules() if name in found]


def _prepare(model: nn.Module, config: SparseConfig, strict: bool) -> State:
    """Find the layers and check them; changes nothing."""
    found = find_all(model)
    name = type(model).__name__
    refused = [f for f in found if f.refusal is not None]
    if not found:
        raise ValueError(
            "model must have attention layers of transformers, timm, open_clip or torchaudio, "
            f"got {name}"
        )
    if strict and refused:
        first = refused[0]
        raise ValueError(
            f"{first.name} ({type(first.module).__name__}) cannot run sparse: {first.refusal}; "
            f"{len(refused)} of {len(found)} layers of {name} are like that, strict=False leaves "
            "them as they are"
        )
    unknown = sorted(config.named_layers - {f.name for f in found})
    if unknown:
        raise ValueError(
            f"config must name layers of {name}, such as {found[0].name!r}, got {unknown[0]!r}"
        )
    taken = [f.name for f in found if LAYER in vars(f.module)]
    if taken:
        raise ValueError(f"model must not be sparsified already as a part of another: {taken[0]}")
    shared = Shared(config, strict)
    trackers: dict[int, ModalityTracker] = {}
    towers: dict[int, Tower] = {}
    served: dict[str, Layer] = {}
    before: list[tuple[Any, str]] = []
    for item in found:
        if isinstance(item, TowerFound):
            towers[id(item.tower)] = item.tower
            served[item.name] = TowerLayer(item, shared)
        elif isinstance(item, HFFound):
            if item.tower is not None:
                towers[id(item.tower)] = item.tower
            tracker = trackers.setdefault(id(item.root), ModalityTracker(item.root))
            served[item.name] = HFLayer(item, shared, tracker)
            if item.modality is None:
                tracker.follow(item.owners)
            before += _configs(item, [config for config, _ in before])
    blocks = find_ordered_blocks(model, served.values())
    parts = list(trackers.values()), list(towers.values()), blocks
    return State(shared, served, *parts, before=before)


def _configs(item: HFFound, known: list[Any]) -> list[tuple[Any, str]]:
    """Configs that name the attention of a layer and make its masks, and what they name."""
    configs: list[tuple[Any, str]] = []
    for owner in (item.module, *item.owners) if dispatches(type(item.module)) else ():
        part = getattr(owner, "config", None)
        if part is not None and all(part is not other for other in known):
            known.append(part)
            configs.append((part, part._attn_implementation))
    return configs


def _attach(model: nn.Module, state: State) -> None:
    if state.before:
        register()
    for layer in state.layers.values():
        layer.attach()
    for config, _ in state.before:
        config._attn_implementation_internal = NAME
    for part in (*state.trackers, *state.towers):
        state.handles += part.attach()
    for blocks in state.blocks:
        blocks.attach()
    setattr(model, STATE, state)
