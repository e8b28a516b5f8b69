"""The layout of one attention call."""

from __future__ import annotations

from dataclasses import dataclass

from mm_sparse.layout.token_layout import TokenLayout


@dataclass(frozen=True, eq=False)
class CallLayout:
    """A layout of M keys, and the place of the first query among them."""

    layout: TokenLayout
    first: int
    prefix: int = 0
    """Tokens in front that are kept whatever the config says (class and register tokens)."""
