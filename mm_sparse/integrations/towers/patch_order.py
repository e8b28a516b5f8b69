"""Blocks of a vision tower that get their tokens in patch order once, not in every layer.

B batch, N tokens, C channels
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mm_sparse.integrations.discovery import is_one_of, prefixes
from mm_sparse.integrations.forward_context import is_memory_hook
from mm_sparse.integrations.layer import LAYER, SparseLayer
from mm_sparse.integrations.towers.adapter import EQUIVARIANT, TowerLayer
from mm_sparse.layout import CallLayout, arrange, restore

# What a block may be made of: each token comes out the same wherever it stands.
TOKENWISE = EQUIVARIANT | {
    "timm.models.vision_transformer.Block",
    "timm.models.vision_transformer.LayerScale",
    "timm.layers.layer_scale.LayerScale",
    "timm.layers.drop.DropPath",
    "timm.layers.mlp.Mlp",
    "timm.layers.mlp.GluMlp",
    "timm.layers.mlp.SwiGLU",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNormFp32",
    "timm.layers.norm.RmsNorm",
    "timm.layers.norm.RmsNormFp32",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.normalization.RMSNorm",
    "torch.nn.modules.activation.GELU",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.activation.SiLU",
}


class OrderedBlocks:
    """Stands before the forward of an `nn.Sequential` of timm's blocks.

    A model that calls its blocks one by one, as for features of some of them, goes past it: then
    each layer puts its tokens in order.

    Args:
        blocks: all that is in it gives a token what it would get in any other order of the tokens.
        layers: those that are in it.
    """

    def __init__(self, blocks: nn.Sequential, layers: list[TowerLayer]) -> None:
        self.blocks, self.layers = blocks, layers

    def attach(self) -> None:
        """Have the blocks called by way of this."""
        vars(self.blocks)["forward"] = self

    def detach(self) -> None:
        """Undo `attach`, unless something else took its place."""
        if vars(self.blocks).get("forward") is self:
            del vars(self.blocks)["forward"]

    def __call__(self, tokens: Tensor) -> Tensor:
        calls = [] if torch.compiler.is_compiling() else self.calls_in_patch_order(tokens)
        if not calls:
            return nn.Sequential.forward(self.blocks, tokens)
        layout, first = calls[0][1].layout, calls[0][1].first
        from mm_sparse.integrations.towers.sdpa_redirect import CALLS_IN_PATCH_ORDER

        token = CALLS_IN_PATCH_ORDER.set({id(layer): call for layer, call in calls})
        try:
            # Not kept by a name: the first block's input goes when the block is done with it.
            out = nn.Sequential.forward(self.blocks, arrange(tokens, layout, first, dim=1))
        finally:
            CALLS_IN_PATCH_ORDER.reset(token)
        return restore(out, layout, first, dim=1)

    def calls_in_patch_order(self, tokens: Tensor) -> list[tuple[SparseLayer, CallLayout]]:
        """Where each layer that runs sparse has (B, N, C) tokens in order; none if they disagree.

        Nobody must look into the blocks, where tokens are in patch order.
        """
        calls: list[tuple[SparseLayer, CallLayout]] = []
        for layer in self.layers:
            if layer.standby is not None and not layer.standby.wrapped:
                continue
            if layer.early_mode(tokens.shape[1], tokens.device)[0] != "sparse":
                continue
            call = layer.layout_in_patch_order(tokens)
            if call is None or (calls and calls[0][1].layout is not call.layout):
                return []
            calls.append((layer, call))
        # Last: it looks at every module, which short sequences, that run dense, need not wait for.
        return calls if calls and _plain(self.blocks) else []


def find_ordered_blocks(model: nn.Module, layers: Iterable[SparseLayer]) -> list[OrderedBlocks]:
    """Every `nn.Sequential` around layers of `model` whose tokens may come in any order."""
    modules = dict(model.named_modules())
    by_blocks: dict[int, OrderedBlocks] = {}
    for layer in layers:
        if not isinstance(layer, TowerLayer):
            continue
        around = [modules[name] for name in prefixes(layer.name)][::-1]
        blocks = next((m for m in around if type(m) is nn.Sequential), None)
        if blocks is None:
            continue
        if id(blocks) not in by_blocks and "forward" not in vars(blocks) and _plain(blocks):
            by_blocks[id(blocks)] = OrderedBlocks(blocks, [])
        if id(blocks) in by_blocks:
            by_blocks[id(blocks)].layers.append(layer)
    return list(by_blocks.values())


def _plain(blocks: nn.Module) -> bool:
    """Whether all inside is made of `TOKENWISE` classes as they are, and nobody looks on."""
    parts = list(blocks._modules.values())
    for part in parts:
        if part is None:
            continue
        if not is_one_of(type(part), TOKENWISE):
            return False
        if "forward" in vars(part) and not _served(part):
            return False
        if part._forward_hooks or not all(map(is_memory_hook, part._forward_pre_hooks.values())):
            return False
        if part._backward_hooks or part._backward_pre_hooks:
            return False
        parts += part._modules.values()
    return True


def _served(module: nn.Module) -> bool:
    """Whether a layer stands before a module's forward, and that is its class's."""
    layer, forward = vars(module).get(LAYER), vars(module)["forward"]
    return layer is not None and getattr(forward, "layer", None) is layer and forward.before is None
