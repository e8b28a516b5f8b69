"""Put sparse attention into an existing model, and take it out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from mm_sparse.config import SparseConfig
from mm_sparse.integrations.discovery import AttentionModule, prefixes, scorer_shape
from mm_sparse.integrations.forward_context import ForwardMemory
from mm_sparse.integrations.hf.attention import NAME, NAMES, PACKED_NAME, HFLayer, register
from mm_sparse.integrations.hf.discovery import (
    HFAttentionModule,
    find_layers,
    uses_attention_interface,
)
from mm_sparse.integrations.hf.modality_tracker import ModalityTracker
from mm_sparse.integrations.hf.packed_tower import PackedTower
from mm_sparse.integrations.layer import LAYER, SparseLayer
from mm_sparse.integrations.scorers import SCORERS, hold_scorers, make_scorer
from mm_sparse.integrations.shared_state import Settings, Shared
from mm_sparse.integrations.standby.groups import configs_around, standby_groups
from mm_sparse.integrations.standby.standby import (
    NamedConfig,
    Standby,
    name_sparse,
    no_longer_wanted,
)
from mm_sparse.integrations.state import State, part_of, scorers_of, states_in
from mm_sparse.integrations.tower_tokens import TowerTokens
from mm_sparse.integrations.towers.adapter import TowerLayer
from mm_sparse.integrations.towers.adapters import ModuleAdapter, TowerAdapter
from mm_sparse.integrations.towers.discovery import TowerAttentionModule, find_towers
from mm_sparse.integrations.towers.patch_order import find_ordered_blocks
from mm_sparse.scorers import Scorer, registered_scorers

M = TypeVar("M", bound=nn.Module)


def sparsify(
    model: M,
    config: SparseConfig | None = None,
    *,
    strict: bool = True,
    scorer: str | Callable[..., Scorer] | None = None,
    modules: Sequence[type[nn.Module]] = (),
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
            and head_dim, or a name given to `register_scorer`. On a sparsified model None keeps the
            scorers that are there.
        modules: classes of your own whose forward calls `scaled_dot_product_attention`; a whole
            library of them is served by a `TowerAdapter`. On a sparsified model () keeps those
            that were named before.
    Returns:
        The model itself.
    Raises:
        ValueError: a layer cannot be served; the message names it, its class and what is missing.
        TypeError: model or config is of another type.

    Whatever is raised, the model is as it was before the call.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/a/model")
        >>> mms.sparsify(model, mms.SparseConfig.preset("text"))
        >>> print(mms.report(model))
    """
    config = SparseConfig() if config is None else config
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, SparseConfig):
        raise TypeError(f"config must be a SparseConfig, got {type(config).__name__}")
    names = (*sorted(registered_scorers()),)
    if not (scorer is None or scorer in names or callable(scorer)):
        raise ValueError(f"scorer must be None, one of {names} or a callable, got {scorer!r}")
    previous = _whole_states(
        model, "not be a part of a sparsified model", "sparsify that one again, or densify it first"
    )
    scorers = {id(la.module): la.scorer for state in previous for la in state.layers.values()}
    named = [cls for state in previous for cls in state.modules]
    modules = modules or tuple(dict.fromkeys(named))
    _take_out(previous)
    try:
        state = _prepare(model, config, strict, modules)
        for layer in state.layers.values():
            if layer.known_mode()[0] == "sparse":
                layer.scorer = make_scorer(layer, scorer, scorers.get(id(layer.module)), strict)
        _check_budgets(state)
        for before in previous:
            _warn_of_ratio(before.shared.base.config, config)
    except BaseException:
        for state in previous:
            _put_in(state)
        raise
    state.holders = [holder for before in previous for holder in before.holders]
    _put_in(state)
    return model


def densify(model: M) -> M:
    """Undo `sparsify`: the model is as it was, and its scorers are gone unless they were saved.

    Raises:
        ValueError: the model is a part of a sparsified one, or somebody replaced the forward of a
            layer after `sparsify`; nothing changes then.
    """
    _take_out(_whole_states(model, "be a whole sparsified model", "densify that one"))
    return model


@contextmanager
def sparse(model: M, config: SparseConfig | None = None, **options: Any) -> Iterator[M]:
    """`sparsify` around a block; afterwards the model is as before, sparse or not."""
    previous = states_in(model)
    sparsify(model, config, **options)
    try:
        yield model
    finally:
        densify(model)
        for state in previous:
            _put_in(state)


def find_all(model: nn.Module, adapters: Sequence[TowerAdapter] = ()) -> list[AttentionModule]:
    """Attention layers of all libraries, in the order of the model's modules."""
    by_name: dict[str, AttentionModule] = {f.name: f for f in find_layers(model)}
    # To transformers, a tower that one of its models wraps has attention that does not dispatch.
    by_name.update((f.name, f) for f in find_towers(model, adapters))
    return [by_name[name] for name, _ in model.named_modules() if name in by_name]


def _prepare(
    model: nn.Module,
    config: SparseConfig,
    strict: bool,
    modules: Sequence[type[nn.Module]] = (),
) -> State:
    """Find the layers and check them; changes nothing."""
    items = find_all(model, (ModuleAdapter(modules),) if modules else ())
    name = type(model).__name__
    named_dense = set(config.dense_layers)
    refused = [
        item
        for item in items
        if item.refusal is not None and named_dense.isdisjoint((item.name, _number_of(item)))
    ]
    if not items:
        raise ValueError(
            "model must have attention layers of transformers, timm, open_clip or torchaudio, "
            f"got {name}; name classes of your own with modules=[...], or call "
            "mms.sparse_attention yourself"
        )
    if strict and refused:
        first = refused[0]
        raise ValueError(
            f"{first.name} ({type(first.module).__name__}) cannot run sparse: {first.refusal}; "
            f"{len(refused)} of {len(items)} layers of {name} are like that, strict=False leaves "
            "them as they are"
        )
    unknown = sorted(config.named_layers - {f.name for f in items})
    if unknown:
        raise ValueError(
            f"config must name layers of {name}, such as {items[0].name!r}, got {unknown[0]!r}"
        )
    memory = ForwardMemory(_blocks_around(model, items))
    shared = Shared(Settings(config), strict, memory)
    trackers: dict[int, ModalityTracker] = {}
    towers: dict[int, TowerTokens | PackedTower] = {}
    served: dict[str, SparseLayer] = {}
    before: list[NamedConfig] = []
    for item in items:
        if isinstance(item, TowerAttentionModule):
            towers[id(item.tower)] = item.tower
            served[item.name] = TowerLayer(item, shared)
        elif isinstance(item, HFAttentionModule):
            if item.tower is not None:
                towers[id(item.tower)] = item.tower
            if item.packed and id(item.owners[-1]) not in towers:
                towers[id(item.owners[-1])] = PackedTower(item.owners[-1])
            tracker = trackers.setdefault(id(item.root), ModalityTracker(item.root))
            served[item.name] = HFLayer(item, shared, tracker)
            tracker.follow(item.owners if item.modality is None else item.owners[:1])
            if item.refusal is None:
                before += _configs(item, [config for config, *_ in before])
    before = _stand_by(items, served, shared, memory, before, trackers.values())
    for part in (*trackers.values(), *towers.values()):
        part.memory = memory
    blocks = find_ordered_blocks(model, served.values())
    parts = list(trackers.values()), list(towers.values()), blocks, memory
    return State(shared, served, *parts, root=name, modules=tuple(modules), before=before)


def _stand_by(
    items: Sequence[AttentionModule],
    served: dict[str, SparseLayer],
    shared: Shared,
    memory: ForwardMemory,
    configs: list[NamedConfig],
    trackers: Iterable[ModalityTracker],
) -> list[NamedConfig]:
    """Note which layers stay as they were for now; gives the configs that others go by."""
    for group in standby_groups(items, served, shared.config):
        own = [named for named in configs if id(named[0]) in group.configs]
        configs = [named for named in configs if id(named[0]) not in group.configs]
        standby = Standby(group.layers, own, memory)
        shared.standbys.append(standby)
        for layer in group.layers:
            layer.standby = standby
    for item in items:
        layer = served[item.name]
        if layer.standby is None:
            continue
        if isinstance(layer, HFLayer) and layer.modality is None:
            for tracker in trackers:
                tracker.watch(layer.standby, layer.module)
        tower = item.tower if isinstance(item, TowerAttentionModule | HFAttentionModule) else None
        if tower is not None:
            tower.standby = layer.standby
    return configs


def _check_budgets(state: State) -> None:
    """Refuse budgets for layers or heads that the model does not have."""
    config = state.shared.config
    sparse = [layer for layer in state.layers.values() if layer.known_mode()[0] == "sparse"]
    numbers = {layer.index for layer in state.layers.values() if layer.index is not None}
    for field in ("dense_layers", "layer_ratio"):
        unknown = [x for x in getattr(config, field) if isinstance(x, int) and x not in numbers]
        if unknown:
            had = f"0 to {max(numbers)}" if numbers else "no numbers, only names"
            raise ValueError(
                f"config.{field} must have layers of {state.root}, which have {had}; "
                f"got {unknown[0]}"
            )
    for layer in sparse:
        for ratios in config.of_layer(layer.index, layer.name).head_counts:
            try:
                kv_heads = scorer_shape(layer.module)[1]
            except ValueError:
                continue
            if ratios != kv_heads:
                raise ValueError(
                    f"config must have a ratio for each of {kv_heads} KV heads of {layer.name}, "
                    f"got {ratios}"
                )


def _warn_of_ratio(before: SparseConfig, now: SparseConfig) -> None:
    """Say that another ratio changes nothing where budgets of layers stay as they were."""
    if now.layer_ratio and now.layer_ratio == before.layer_ratio and now.ratio != before.ratio:
        warnings.warn(
            f"config.ratio {now.ratio:g} has no effect on layers that layer_ratio names, which is "
            f"as it was with {before.ratio:g}: mms.sparse_config(model).scaled({now.ratio:g}) "
            "scales it",
            stacklevel=3,
        )


def _blocks_around(model: nn.Module, items: Sequence[AttentionModule]) -> Iterator[nn.Module]:
    """Modules inside the model that a checkpoint may compute again: what holds attention."""
    parts = dict(model.named_modules())
    for item in items:
        yield from (parts[name] for name in prefixes(item.name) if name)


def _number_of(item: AttentionModule) -> int | None:
    number = getattr(item.module, "layer_idx", None)
    return number if isinstance(number, int) and item.modality is None else None


def _configs(item: HFAttentionModule, known: list[Any]) -> list[NamedConfig]:
    """Configs that name the attention of a layer and make its masks: with the names before, now."""
    configs: list[NamedConfig] = []
    own = getattr(item.module, "config", None)
    for part in configs_around(item) if uses_attention_interface(type(item.module)) else ():
        if all(part is not other for other in known):
            known.append(part)
            name = PACKED_NAME if item.packed and part is own else NAME
            configs.append((part, part._attn_implementation, name))
    return configs


def _whole_states(model: nn.Module, wanted: str, advice: str) -> list[State]:
    """The states in a model; an error where it holds a part of a sparsified model only."""
    states = states_in(model)
    for state in states:
        if part_of(model, state):
            raise ValueError(
                f"model must {wanted}, got a {type(model).__name__} of a {state.root}: {advice}"
            )
    return states


def _put_in(state: State) -> None:
    if state.before or any(standby.configs for standby in state.shared.standbys):
        register()
    name_sparse(state.before)
    for layer in state.layers.values():
        vars(layer.module)[LAYER] = layer
        layer.attach()
    for part in (*state.trackers, *state.towers):
        state.handles += part.attach()
    for blocks in state.blocks:
        blocks.attach()
    for holder in state.holders:
        hold_scorers(holder, scorers_of(holder))


def _take_out(states: Sequence[State]) -> None:
    for state in states:
        for layer in state.layers.values():
            layer.check_detachable()
    for state in states:
        for standby in state.shared.standbys:
            standby.take_out()
        for handle in state.handles:
            handle.remove()
        state.handles.clear()
        state.memory.detach()
        for blocks in state.blocks:
            blocks.detach()
        for holder in state.holders:
            holder._modules.pop(SCORERS, None)
        for layer in state.layers.values():
            layer.detach()
            vars(layer.module).pop(LAYER, None)
        no_longer_wanted(state.before)
        for config, name, _ in state.before:
            # Unless `set_attn_implementation` named another one since.
            if config._attn_implementation in NAMES:
                config._attn_implementation_internal = name
