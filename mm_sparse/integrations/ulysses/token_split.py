"""Hooks that give the blocks of a decoder the tokens of one rank.

Embeddings, masks and positions are made of whole sequences, so that each is what it is on one
device; the first block takes the tokens of its rank, all blocks the positions of these tokens.

P ranks, B batch, N tokens of all ranks, n = N / P
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_flatten_with_path, tree_map_only

from mm_sparse.integrations.ulysses.exchange import Group, gather
from mm_sparse.integrations.ulysses.split_cache import SplitCache

# Arguments of a block that have something for each token: along which dimension.
TOKEN_DIMS = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}
# Those that are meant for attention, which has all tokens.
WHOLE = ("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens")
# Modules and parameters by which a block mixes tokens otherwise than by attention.
MIXERS, MIXER_PARAMETERS = (nn.Conv1d, nn.Conv2d, nn.RNNBase), ("A_log", "dt_bias")


class Blocks(NamedTuple):
    """The blocks of a decoder, each with one attention layer."""

    name: str
    """Of their list in the model."""
    modules: list[nn.Module]


def find_blocks(model: nn.Module, attention: dict[str, nn.Module]) -> Blocks:
    """The list of blocks that holds attention layers.

    Args:
        attention: the layers by name in the model.

    Raises:
        ValueError: there are several such lists, or a block has no attention or mixes tokens in
            another way, too.
    """
    modules = dict(model.named_modules())
    lists: dict[str, dict[str, list[str]]] = {}
    for name in attention:
        parts = name.split(".")
        places = [".".join(parts[:at]) for at in range(len(parts) - 1, 0, -1)]
        home = next((p for p in places if isinstance(modules[p], nn.ModuleList)), None)
        if home is None:
            raise ValueError(
                f"{name} must be in a ModuleList of blocks, got a layer outside of one"
            )
        block = ".".join(parts[: home.count(".") + 2])
        lists.setdefault(home, {}).setdefault(block, []).append(name)
    if len(lists) != 1:
        raise ValueError(
            "model must have one list of blocks with attention to split tokens for, got "
            f"{sorted(lists) or 'none'}: name a part that has one"
        )
    home, found = next(iter(lists.items()))
    for key, block in modules[home].named_children():
        name, kind = f"{home}.{key}", type(block).__name__
        if len(found.get(name, ())) != 1:
            raise ValueError(
                f"{name} ({kind}) must have one attention layer that is served, got "
                f"{len(found.get(name, ()))}: its tokens cannot be split between ranks"
            )
        mixers = [n for n, m in block.named_modules() if isinstance(m, MIXERS)]
        mixers += [n for n, _ in block.named_parameters() if n.endswith(MIXER_PARAMETERS)]
        if mixers:
            raise ValueError(
                f"{name} ({kind}) must mix tokens by attention alone, got {mixers[0]}: its tokens "
                "cannot be split between ranks"
            )
    return Blocks(home, list(modules[home].children()))


class TokenSplit:
    """Which tokens of a sequence a rank has: those from rank * n on, n of them.

    Where keys are kept, prompts of any length are split: padding stands behind the last token
    outside of attention. Steps after it are not split.

    Args:
        blocks: of the decoder.
        group: of P ranks.
        cache: keys that are kept.
    """

    def __init__(self, blocks: Blocks, group: Group, cache: SplitCache) -> None:
        self.name, self.blocks = blocks.name, blocks.modules
        self.group, self.cache = group, cache
        self.rank, self.size = group.rank(), group.size()

    def attach(self, owner: nn.Module) -> list[Any]:
        """Set the hooks; returns their handles.

        Args:
            owner: the model whose forward runs the blocks.
        """
        handles = [owner.register_forward_pre_hook(self._before_model, with_kwargs=True)]
        for number, block in enumerate(self.blocks):
            hook = self._before_first if number == 0 else self._before_block
            handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        handles.append(owner.register_forward_hook(self._after_model, always_call=True))
        return handles

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """The tokens of this rank, a view.

        Raises:
            ValueError: the number of tokens is no multiple of the number of ranks.
        """
        tokens = x.shape[dim]
        if tokens % self.size:
            raise ValueError(
                f"the number of tokens must be a multiple of {self.size} ranks, got {tokens}: see "
                "`SequenceParallel.pad`"
            )
        return x.narrow(dim, self.rank * (tokens // self.size), tokens // self.size)

    def _before_model(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the model adds to the tokens between its blocks is cut to those of this rank."""
        cache = kwargs.get("past_key_values")
        if cache is None:
            kwargs = {**kwargs, "use_cache": False}
        else:
            given = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args[:1]]
            tokens = next(x.shape[1] for x in given if x is not None)
            self.cache.begin(cache, tokens)
            if self.cache.is_step:
                return args, kwargs
        seen, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if seen is not None and features is not None:
            # One feature for each visual token, in the order of tokens.
            own = seen.new_zeros(seen.shape)
            count = -(-seen.shape[1] // self.size)
            own[:, self.rank * count : (self.rank + 1) * count] = True
            own = own[seen]
            kwargs["visual_pos_masks"] = self._take(seen)
            kwargs["deepstack_visual_embeds"] = [x[own.to(x.device)] for x in features]
        return args, kwargs

    def _after_model(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Whoever keeps keys is given the states of all tokens, for the logits of the last."""
        cache = self.cache
        is_prefill, tokens = cache.is_prefill, cache.tokens
        cache.end()
        if not is_prefill or output is None:
            return output
        if getattr(output, "hidden_states", None) is not None:
            raise ValueError(
                "output_hidden_states must be False where tokens are split between ranks"
            )
        whole = gather(output[0], self.group, 1)[:, :tokens]
        if isinstance(output, tuple):
            return whole, *output[1:]
        output.last_hidden_state = whole
        return output

    def _take(self, x: Tensor, dim: int = 1) -> Tensor:
        """As `take`, with zeros behind the last token of a prompt."""
        missing = -x.shape[dim] % self.size
        if missing and self.cache.is_prefill:
            behind = x.dim() - 1 - dim % x.dim()
            x = pad(x, (*(0, 0) * behind, 0, missing))
        return self.take(x, dim)

    def _before_first(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.cache.is_step and self.cache.cache is not None:
            return args, kwargs
        hidden, put = _hidden_states(args, kwargs)
        tokens = hidden.shape[1]
        args, kwargs = put(self._take(hidden))
        return self._positions(args, kwargs, tokens)

    def _before_block(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.cache.cache is None:
            hidden, _ = _hidden_states(args, kwargs)
            return self._positions(args, kwargs, hidden.shape[1] * self.size)
        if self.cache.is_step:
            return args, kwargs
        return self._positions(args, kwargs, self.cache.tokens)

    def _positions(self, args: Any, kwargs: dict[str, Any], tokens: int) -> Any:
        """The arguments of a block with those of `TOKEN_DIMS` cut to the tokens of this rank."""
        if self.size == 1:
            return args, kwargs
        kwargs = dict(kwargs)
        for name, dim in TOKEN_DIMS.items():
            if kwargs.get(name) is not None:
                kwargs[name] = tree_map_only(
                    Tensor, lambda x, dim=dim: self._cut(x, dim, tokens), kwargs[name]
                )
        rest = {k: x for k, x in kwargs.items() if k not in WHOLE and k not in TOKEN_DIMS}
        for path, x in tree_flatten_with_path((args, rest))[0]:
            if isinstance(x, Tensor) and tokens in x.shape:
                raise ValueError(
                    f"blocks of {self.name} must be given nothing for each of {tokens} tokens but "
                    f"{', '.join(TOKEN_DIMS)}, got a tensor of shape {tuple(x.shape)} as "
                    f"{path[-1]}: it is not known how to split it"
                )
        return args, kwargs

    def _cut(self, x: Tensor, dim: int, tokens: int) -> Tensor:
        return self._take(x, dim) if x.shape[dim] == tokens else x


def _hidden_states(args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """(B, N, width) that a block is given, and a function that gives it another."""
    if args:
        return args[0], lambda x: ((x, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda x: (args, {**kwargs, "hidden_states": x})
