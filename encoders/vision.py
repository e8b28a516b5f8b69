"""Vision encoders by name: images in, tokens and their grid out, attention sparse if wanted.

B images, P patches, C width, h x w grid of patches (P = h * w, row by row)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mm_sparse.config import SparseConfig
from mm_sparse.encoders.backbones.vision import (
    OpenClipVision,
    TimmVision,
    TransformersVision,
    VisionEncoder,
)
from mm_sparse.encoders.base import choose, made_sparse
from mm_sparse.scorers import Scorer

__all__ = ["VisionEncoder", "create_vision_encoder"]


def create_vision_encoder(
    name: str,
    source: str = "timm",
    sparse: SparseConfig | None = None,
    pretrained: bool | str = False,
    *,
    image_size: int | tuple[int, int] | None = None,
    keep_prefix: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    strict: bool = True,
    scorer: str | Callable[..., Scorer] | None = None,
    **options: Any,
) -> VisionEncoder:
    """A vision transformer whose forward takes (B, 3, H, W) in [0, 1] and gives tokens and spec.

    It comes in evaluation mode.

    Args:
        name: timm's or open_clip's name of a model; for transformers a model type ("vit",
            "siglip_vision_model", ...), or a folder or name for `from_pretrained`.
        source: "timm", "open_clip" or "transformers".
        sparse: how its attention is sparse; None leaves it dense, for a later `sparsify`.
        pretrained: load weights, which downloads them unless `name` is a folder; for open_clip the
            tag of the weights or a file.
        image_size: pixels of a side that positions are made for; the architecture's own if None.
            timm and most transformers models take other sizes too, open_clip's do not.
        keep_prefix: hand over class and register tokens too, in front of the patches; False for
            patches alone, as a language model reads them.
        mean, std: of the three colours; what the library says of the weights, or 0.5, if None.
        strict, scorer: as in `mm_sparse.sparsify`.
        options: further arguments of the architecture.
    Raises:
        TypeError: the backbone is no vision transformer.
        ValueError: `sparse` is given and a layer cannot be served; the message names it.
    """
    make = choose("source", source, {"timm": _timm, "open_clip": _open_clip,
                                     "transformers": _transformers})  # fmt: skip
    kind, backbone, statistics = make(name, pretrained, image_size, options)
    mean, std = (statistics[0] if mean is None else mean), (statistics[1] if std is None else std)
    made = kind(backbone, keep_prefix=keep_prefix, mean=mean, std=std)
    return made_sparse(made.eval(), sparse, strict=strict, scorer=scorer)


Made = tuple[type[VisionEncoder], Any, tuple[Any, Any]]


def _timm(name: str, pretrained: bool | str, image_size: Any, options: dict[str, Any]) -> Made:
    return TimmVision, _timm_model(name, bool(pretrained), image_size, **options), (None, None)


def _timm_model(name: str, pretrained: bool, image_size: Any, **options: Any) -> Any:
    """A timm model without a head that takes images of any size, where its architecture can."""
    import timm

    if image_size is not None:
        options["img_size"] = image_size
    options.setdefault("num_classes", 0)
    try:
        return timm.create_model(
            name, pretrained=pretrained, **{"dynamic_img_size": True, **options}
        )
    except TypeError as error:
        if "dynamic_img_size" not in str(error) or "dynamic_img_size" in options:
            raise
        return timm.create_model(name, pretrained=pretrained, **options)


def _open_clip(name: str, pretrained: bool | str, image_size: Any, options: Any) -> Made:
    import open_clip

    if pretrained is True:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"pretrained must be a tag or a file for open_clip, one of {tags}, or one")
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"name must be a model of open_clip, got {name!r}")
    changes: dict[str, Any] = {"vision_cfg": {**config["vision_cfg"], **options}}
    if image_size is not None:
        changes["vision_cfg"]["image_size"] = image_size
    if not pretrained:
        # The text tower is thrown away.
        changes["text_cfg"] = {"layers": 1, "width": 64, "heads": 1}
    model: Any = open_clip.create_model(
        name, pretrained=pretrained or None, pretrained_image=False, pretrained_text=False,
        force_custom_text=True, **changes,
    )  # fmt: skip
    visual = model.visual
    statistics = (getattr(visual, "image_mean", None), getattr(visual, "image_std", None))
    if hasattr(visual, "trunk"):
        return TimmVision, visual.trunk, statistics
    return OpenClipVision, visual, statistics


def _transformers(name: str, pretrained: bool | str, image_size: Any, options: Any) -> Made:
    from mm_sparse.encoders.backbones.hf import load_model

    if image_size is not None:
        options["image_size"] = image_size
    model, statistics = load_model(name, bool(pretrained), options), (None, None)
    if pretrained:
        from transformers import AutoImageProcessor

        processor: Any = AutoImageProcessor.from_pretrained(name)
        statistics = (processor.image_mean, processor.image_std)
    return TransformersVision, model, statistics
