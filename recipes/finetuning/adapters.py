"""Adapters of peft on the language model inside a checkpoint's model, and models without them."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from mm_sparse.recipes.finetuning.checkpoint_folders import language_part
from mm_sparse.recipes.models import LoraConfig


def add_adapters(model: Any, lora: LoraConfig) -> Any:
    """A `PeftModel` with adapters on the named layers of the language model; the rest is frozen.

    Adapters are held in float32, as peft has them, and computed in the dtype of what they add to:
    peft would widen the inputs of every layer, which took a third of a step of a 7B model.

    Raises:
        ValueError: the language model has no layer of these names.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    prefix = language_part(model)
    names = "|".join(map(re.escape, lora.modules))
    pattern = rf"{re.escape(prefix)}\..*\.(?:{names})" if prefix else rf".*\.(?:{names})"
    if not any(re.fullmatch(pattern, name) for name, _ in model.named_modules()):
        raise ValueError(
            f"lora.modules must name layers of the language model of {type(model).__name__}, got "
            f"{lora.modules}"
        )
    config = lora.of_peft()
    config.target_modules = pattern
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer: Any = module
        layer.cast_input_dtype_enabled = False
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            part.__class__ = NarrowLinear
    return adapted


class NarrowLinear(nn.Linear):
    """A layer whose weights are rounded to the dtype of its input, where that is narrower."""

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return nn.functional.linear(input, self.weight.to(input.dtype))


def merged_weights(model: Any) -> dict[str, Tensor]:
    """State dict of the base model of a `PeftModel`, adapters added to the weights, for its own
    `save_pretrained`; the model stays as it is.

    Raises:
        ValueError: the weights are held in 4 or 8 bits.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        raise ValueError("merge must be false for weights of 4 or 8 bits, export the adapter")
    inside: list[tuple[str, Any]] = list(base.named_modules())
    deltas: dict[str, Tensor] = {}
    for name, module in inside:
        layer: Any = module if isinstance(module, BaseTunerLayer) else None
        if layer is not None:
            deltas[f"{name}.weight"] = layer.get_delta_weight("default")
    weights = {}
    for name, value in base.state_dict().items():
        if "lora_" in name:
            continue
        own = name.replace(".base_layer.", ".")
        delta = deltas.get(own)
        weights[own] = value if delta is None else value + delta.to(value.dtype)
    return weights
