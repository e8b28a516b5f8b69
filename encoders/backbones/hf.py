"""Models of transformers by type, folder or name."""

from __future__ import annotations

from typing import Any


def load_model(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    """`AutoModel` of a model type or of what `from_pretrained` takes.

    Args:
        name: a model type ("vit", "whisper", ...) or a folder or name.
        pretrained: load weights; a model type has none.
        options: fields of the config.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name in CONFIG_MAPPING:
        if pretrained:
            raise ValueError(
                f"pretrained must be False for a model type, which has no weights, got {name!r}"
            )
        config = AutoConfig.for_model(name, **options)
    else:
        config = AutoConfig.from_pretrained(name, **options)
    if pretrained:
        return AutoModel.from_pretrained(name, config=config)
    return AutoModel.from_config(config)
