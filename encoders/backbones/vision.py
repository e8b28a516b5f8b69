"""Vision transformers of timm, open_clip and transformers behind one forward.

B images, N tokens, P patches, C width, h x w grid of patches (P = h * w, row by row)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse.encoders.base import Encoder
from mm_sparse.encoders.interleaving import TokenSpec
from mm_sparse.integrations.hf import prefix_tokens
from mm_sparse.modality import Modality


class VisionEncoder(Encoder):
    """Images in [0, 1] to tokens; it applies the mean and deviation that the weights want.

    Args:
        backbone: the library's module.
        keep_prefix: hand over class and register tokens too, in front of the patches.
        mean, std: of the three colours; what the backbone says, or 0.5, if None.
    """

    mean: Tensor
    std: Tensor
    library: str

    def __init__(
        self,
        backbone: nn.Module,
        *,
        keep_prefix: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(backbone)
        self.check_backbone()
        self.keep_prefix = keep_prefix
        given = (("mean", mean), ("std", std))
        for (name, value), default in zip(given, self.statistics(), strict=True):
            value = default if value is None else value
            if len(value) != 3:
                raise ValueError(f"{name} must be three numbers, got {value!r}")
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def check_backbone(self) -> None:
        """Raise a TypeError that says what the backbone lacks."""

    def lacks(self, what: str) -> TypeError:
        """The error of a backbone without something."""
        name = type(self.backbone).__name__
        return TypeError(
            f"backbone must be a {self.library} vision transformer with {what}, "
            f"got {name} without it"
        )

    def statistics(self) -> tuple[Any, Any]:
        """Mean and deviation that the backbone knows."""
        return [0.5] * 3, [0.5] * 3

    @property
    def prefix(self) -> int:
        """Class and register tokens that the backbone puts in front of the patches."""
        raise NotImplementedError

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patch rows and columns of an image with this many pixels."""
        raise NotImplementedError

    def size_problem(self, height: int, width: int) -> str | None:
        """What sizes the backbone takes, if not this one."""
        raise NotImplementedError

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, prefix + P, C)."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, 3, H, W) in [0, 1] -> (B, prefix + P, C) and the grid.

        Raises:
            ValueError: not images, or of a size whose positions the backbone does not have.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got shape {tuple(images.shape)}")
        height, width = images.shape[-2:]
        problem = self.size_problem(height, width)
        if problem is not None:
            raise ValueError(
                f"images must be {problem}, got {height} x {width} for "
                f"{type(self.backbone).__name__}"
            )
        h, w = self.grid(height, width)
        tokens = self.tokens((images - self.mean) / self.std)
        if tokens.ndim != 3 or tokens.shape[1] != self.prefix + h * w:
            raise ValueError(
                f"backbone {type(self.backbone).__name__} must give (B, {self.prefix + h * w}, C) "
                f"for a {h} x {w} grid, got shape {tuple(tokens.shape)}"
            )
        return tokens, (h, w)

    def forward(self, images: Tensor) -> tuple[Tensor, TokenSpec]:
        """(B, 3, H, W) in [0, 1] -> tokens (B, N, C) and their `TokenSpec`: grid and prefix."""
        tokens, grid = self.encode(images)
        prefix = self.prefix if self.keep_prefix else 0
        return tokens[:, self.prefix - prefix :], TokenSpec(Modality.IMAGE, grid, prefix)


class TimmVision(VisionEncoder):
    """A timm transformer without its head."""

    library = "timm"

    def check_backbone(self) -> None:
        for needed in ("forward_features", "num_features"):
            if not hasattr(self.backbone, needed):
                raise self.lacks(f"`{needed}`")
        if self.embed is None:
            raise self.lacks("`patch_embed`")

    @property
    def embed(self) -> Any:
        """The module that cuts an image into patches (`embeds` in NaFlexViT)."""
        patch_embed = getattr(self.backbone, "patch_embed", None)
        return getattr(self.backbone, "embeds", None) if patch_embed is None else patch_embed

    def statistics(self) -> tuple[Any, Any]:
        settings = getattr(self.backbone, "pretrained_cfg", None) or {}
        return tuple(settings.get(name) or [0.5] * 3 for name in ("mean", "std"))  # pyright: ignore

    @property
    def width(self) -> int:
        return self.backbone.num_features

    @property
    def prefix(self) -> int:
        return getattr(self.backbone, "num_prefix_tokens", 0)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.embed.dynamic_feat_size((height, width))
        return int(rows), int(columns)

    def size_problem(self, height: int, width: int) -> str | None:
        embed = self.embed
        size = getattr(embed, "img_size", None)
        if size is not None and getattr(embed, "strict_img_size", False):
            return _one_size((height, width), size)
        patch = getattr(embed, "patch_size", (1, 1))
        if getattr(embed, "dynamic_img_pad", False):
            return None
        return _whole_patches((height, width), patch)

    def tokens(self, images: Tensor) -> Tensor:
        return self.backbone.forward_features(images)


class OpenClipVision(VisionEncoder):
    """The vision tower of an open_clip model (`model.visual`), up to its last norm."""

    library = "open_clip"

    def check_backbone(self) -> None:
        for needed in ("forward_intermediates", "transformer", "patch_size"):
            if not hasattr(self.backbone, needed):
                raise self.lacks(f"`{needed}`")

    def statistics(self) -> tuple[Any, Any]:
        statistics = (getattr(self.backbone, name, None) for name in ("image_mean", "image_std"))
        return tuple(value or [0.5] * 3 for value in statistics)  # pyright: ignore

    @property
    def width(self) -> int:
        return self.backbone.class_embedding.shape[-1]

    @property
    def prefix(self) -> int:
        return 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        patch = self.backbone.patch_size
        return height // patch[0], width // patch[1]

    def size_problem(self, height: int, width: int) -> str | None:
        return _one_size((height, width), self.backbone.image_size)

    def tokens(self, images: Tensor) -> Tensor:
        outputs = self.backbone.forward_intermediates(
            images, indices=1, normalize_intermediates=True, intermediates_only=True,
            output_fmt="NLC", output_extra_tokens=True,
        )  # fmt: skip
        parts = outputs["image_intermediates_prefix"][-1], outputs["image_intermediates"][-1]
        return torch.cat(parts, 1)


class TransformersVision(VisionEncoder):
    """A vision model of transformers, or the vision part of one that reads text too."""

    library = "transformers"

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        super().__init__(getattr(backbone, "vision_model", backbone), **options)

    def check_backbone(self) -> None:
        takes = inspect.signature(self.backbone.forward).parameters
        needed = [n for n, p in takes.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
        if "pixel_values" not in takes or set(needed) - {"pixel_values"}:
            raise self.lacks("a forward that needs `pixel_values` alone")
        for owner, needed in ((self.backbone, "embeddings"), (self.backbone.config, "patch_size")):
            if not hasattr(owner, needed):
                raise self.lacks(f"`{needed}`")

    @property
    def width(self) -> int:
        return self.backbone.config.hidden_size

    @property
    def prefix(self) -> int:
        return prefix_tokens(self.backbone.embeddings)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        patch = _pair(self.backbone.config.patch_size)
        return height // patch[0], width // patch[1]

    def size_problem(self, height: int, width: int) -> str | None:
        config, embeddings = self.backbone.config, self.backbone.embeddings
        size = getattr(config, "image_size", None)
        # Without a table of positions there are rotations, for any place.
        names = ("position_embeddings", "position_embedding", "pos_embed")
        table = any(getattr(embeddings, name, None) is not None for name in names)
        if table and size is not None and not hasattr(embeddings, "interpolate_pos_encoding"):
            return _one_size((height, width), _pair(size))
        return _whole_patches((height, width), _pair(config.patch_size))

    def tokens(self, images: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        size = _pair(getattr(self.backbone.config, "image_size", None) or 0)
        takes = inspect.signature(self.backbone.forward).parameters
        if "interpolate_pos_encoding" in takes and tuple(images.shape[-2:]) != size:
            options["interpolate_pos_encoding"] = True
        return self.backbone(pixel_values=images, **options).last_hidden_state


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _one_size(size: tuple[int, int], only: Any) -> str | None:
    height, width = _pair(only)
    if size == (height, width):
        return None
    return f"{height} x {width} pixels, for which alone there are positions (see `image_size`)"


def _whole_patches(size: tuple[int, int], patch: Any) -> str | None:
    height, width = _pair(patch)
    if min(size) > 0 and size[0] % height == 0 and size[1] % width == 0:
        return None
    return f"of a height and width that are multiples of {height} x {width} pixels"
