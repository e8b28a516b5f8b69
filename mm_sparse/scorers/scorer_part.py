"""A scorer for some of the heads of its layer, as one rank of several needs it.

H query heads, K KV heads
"""

from __future__ import annotations

from copy import copy

from torch import Tensor

from mm_sparse.kernels.paged.pages import Pages
from mm_sparse.layout import Plan
from mm_sparse.scorers.base import Scorer
from mm_sparse.scorers.block_scores import Descriptors
from mm_sparse.scorers.descriptor_cache import DescriptorCache
from mm_sparse.scorers.modality_maps import WeightCache
from mm_sparse.selection import Scores


class ScorerPart(Scorer):
    """Scores of some heads; its parameters are those of the whole scorer.

    Gradients of the parameters are zero for all other heads. A method of this project.

    Args:
        whole: names in `head_dims` the dimension of heads of each of its parameters.
        heads: H and K of the layer.
        part: which of P equal parts of them.
        parts: P.

    Raises:
        ValueError: a parameter is not in `head_dims`, or the scorer writes its own `forward`.
    """

    def __init__(self, whole: Scorer, heads: tuple[int, int], part: int, parts: int) -> None:
        super().__init__()
        own = type(whole)
        unknown = [n for n, _ in whole.named_parameters() if n not in whole.head_dims]
        if unknown:
            raise ValueError(
                f"scorer must name in `head_dims` the dimension of heads of each parameter, to be "
                f"split by heads; {own.__name__} does not for {unknown[0]!r}"
            )
        if own.forward is not Scorer.forward:
            raise ValueError(
                f"scorer must write `score` or `describe` to be split by heads, {own.__name__} "
                "writes `forward`"
            )
        self.whole, self._heads, self._part, self._parts = whole, heads, part, parts
        self._caches: dict[str, WeightCache] = {}
        """In place of those of the whole scorer, whose tensors may begin where views do."""

    def _of_heads(self) -> Scorer:
        """The same scorer with views of its tensors in place of parameters and buffers."""
        whole = self.whole
        made = copy(whole)
        tensors = {**whole._parameters, **whole._buffers}
        own = vars(made)
        own |= {"_parameters": {}, "_buffers": {}}
        own |= {n: None if x is None else self._cut(n, x) for n, x in tensors.items()}
        for name, value in vars(whole).items():
            if isinstance(value, WeightCache):
                own[name] = self._caches.setdefault(name, WeightCache())
        for name, number in zip(("num_query_heads", "num_kv_heads"), self._heads, strict=True):
            if name in own:
                own[name] = number // self._parts
        return made

    def _cut(self, name: str, x: Tensor) -> Tensor:
        dim = self.whole.head_dims.get(name)
        if dim is None:
            return x
        if x.shape[dim] not in self._heads:
            raise ValueError(
                f"{name} of {type(self.whole).__name__} must have one of {self._heads} heads along "
                f"dimension {dim}, got {x.shape[dim]}"
            )
        size = x.shape[dim] // self._parts
        return x.narrow(dim, self._part * size, size)

    def score_plan(
        self,
        q: Tensor,
        k: Tensor,
        plan: Plan,
        scale: float | None = None,
        cache: DescriptorCache | None = None,
    ) -> Scores:
        return self._of_heads().score_plan(q, k, plan, scale, cache)

    def score_step(
        self, q: Tensor, k: Tensor, plan: Plan, placed: Plan, scale: float, cache: DescriptorCache
    ) -> Tensor:
        return self._of_heads().score_step(q, k, plan, placed, scale, cache)

    @property
    def describes(self) -> bool:
        return self.whole.describes

    def described(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Descriptors:
        return self._of_heads().described(q, k, plan, scale)

    def score_described(
        self, described: Descriptors, plan: Plan, pages: Pages | None = None
    ) -> Tensor:
        return self._of_heads().score_described(described, plan, pages)
