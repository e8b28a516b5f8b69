"""What attends to what: mass, kept mass and density by modality of query and key.

B batch, K KV heads, T tiles, U units, M modalities
"""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.nn.functional import one_hot

from mm_sparse import Modality, unit_mass
from mm_sparse.integrations import AttentionCall
from mm_sparse.layout import Plan
from mm_sparse.recipes.metrics import kept_units
from mm_sparse.selection import count_pairs, lists_to_mask

NAMES = [kind.name for kind in Modality]


@dataclass
class AttentionByModality:
    """Sums over the calls that `add` was given; `figures` makes shares of them.

    Mass is that of the call's own queries over all keys: what dense attention would give them.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    """(M, M) float64 each, query first."""

    def add(self, call: AttentionCall) -> None:
        """Count a call of a layer that ran sparse, or dense because its config says so."""
        chosen = call.selection
        if chosen is None and call.layout is None:
            return
        plan = call.plan() if chosen is None else chosen.plan
        mean = replace(plan, config=replace(plan.config, reduce="mean"))
        mass = unit_mass(call.q, call.k, mean, call.scale) * plan.members[:, None, :, None]
        self._count("mass", mass, plan)
        if chosen is None or call.scores is None:
            return
        kept_pairs, seen_pairs = count_pairs(chosen.index, chosen.count, plan)
        self._sum("seen", seen_pairs[: len(Modality)])
        self._sum("kept pairs", kept_pairs[: len(Modality)])
        selected_units = lists_to_mask(chosen.index, chosen.count, plan.units.shape[1])
        true = unit_mass(call.q, call.k, plan, call.scale) if mean.config != plan.config else mass
        best = kept_units(true.clamp(min=1e-20).log(), plan)
        free = (plan.visible & ~plan.always)[:, None]
        self._count("kept mass", mass * selected_units, plan)
        self._count("open", mass * free, plan)
        self._count("kept", mass * (selected_units & free), plan)
        self._count("best", (best & free).float(), plan)
        self._count("both", (best & selected_units & free).float(), plan)

    def figures(self) -> dict[str, Any]:
        """By name the share in all, and by pair, "TEXT>IMAGE" with the query first.

        attention: of a query modality's mass that lies on a key modality. density: of the visible
        pairs that were kept. kept_mass: of the mass. kept: of the mass on what is open to choice,
        not kept anyway. overlap: of what the perfect scorer would choose.
        """
        made = {"attention": ("mass", None), "density": ("kept pairs", "seen"),
                "kept_mass": ("kept mass", "mass"), "kept": ("kept", "open"),
                "overlap": ("both", "best")}  # fmt: skip
        figures: dict[str, Any] = {}
        for name, (part, of) in made.items():
            if part not in self.sums:
                continue
            share = self.sums[part]
            if of is None:
                whole = share.sum(1, keepdim=True).expand_as(share)
            else:
                whole = self.sums[of]
                figures[name] = round((share.sum() / whole.sum().clamp(min=1e-12)).item(), 5)
            own = share / whole.clamp(min=1e-12)
            figures[f"{name}_by_pair"] = {
                f"{NAMES[a]}>{NAMES[b]}": round(own[a, b].item(), 4)
                for a, b in (whole > 0).nonzero().tolist()
                if of is not None or share[a, b] > 0
            }
        return figures

    def _count(self, name: str, x: Tensor, plan: Plan) -> None:
        """Sum (B, K, T, U) by modality of tile and unit."""
        tile, unit = (
            one_hot(kind.long() + 1, len(Modality) + 1)[..., 1:].double()
            for kind in (plan.tile_modality, plan.unit_modality)
        )
        by_tile = tile.transpose(1, 2) @ x.double().sum(1)  # (B, M, U)
        self._sum(name, (by_tile @ unit).sum(0))

    def _sum(self, name: str, x: Tensor) -> None:
        self.sums[name] = self.sums[name] + x.cpu() if name in self.sums else x.cpu()


def mass_shares(attending: AttentionByModality) -> dict[Modality, float]:
    """Share of all mass by modality of the key; they add up to at most 1."""
    by_key = attending.sums["mass"].sum(0)
    shares = (by_key / by_key.sum().clamp(min=1e-12)).tolist()
    # Rounded down: floors of a config may not add up to more than 1.
    return {kind: int(share * 1000) / 1000 for kind, share in zip(Modality, shares, strict=True)}


def kl_by_row(dense: Tensor, sparse: Tensor, row: Tensor) -> list[float]:
    """KL(dense || sparse) in nats of logits (P, vocabulary), mean over each of `row` (P,)."""
    dense, sparse = dense.log_softmax(-1), sparse.log_softmax(-1)
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    return [kl[row == r].mean().item() for r in row.unique()]
