"""Models and processors out of a folder, or a name of the hub."""

from __future__ import annotations

from typing import Any

import torch

from mm_sparse.recipes.finetuning.mistral_requests import check_package


def load_processor(folder: str, **options: Any) -> Any:
    """The `AutoProcessor` of a folder.

    Raises:
        ValueError: there is none.
        ImportError: mistral_common is missing, which makes its tokens.
    """
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"folder must hold a processor, got {folder!r}: {error}") from error
    if not isinstance(processor, ProcessorMixin):
        check_package(folder)
        raise ValueError(
            f"folder must hold a processor of texts and images or audio, got {folder!r} with a "
            f"{type(processor).__name__}"
        )
    return processor


def load_model(
    folder: str, *, dtype: str = "auto", load_in_4bit: bool = False, **options: Any
) -> Any:
    """The model that generates texts, of the class that the folder's config names.

    Without a name that transformers knows it is `AutoModelForImageTextToText`,
    `AutoModelForMultimodalLM` for models that hear, or `AutoModelForCausalLM` for models of text.

    Args:
        folder: a local folder, or a name that is downloaded.
        dtype: of the weights, "bfloat16" for one; "auto" takes that of the folder.
        load_in_4bit: whether linear layers are held in 4 bits (NF4); needs bitsandbytes.
        options: further ones of `from_pretrained`.
    Raises:
        ValueError: there is no such model, or it generates nothing.
        ImportError: bitsandbytes is missing.
    """
    import transformers

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be 'auto' or a dtype of torch, got {dtype!r}")
    if load_in_4bit:
        options["quantization_config"] = _four_bits(dtype)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"folder must hold a model of transformers, got {folder!r}: {error}"
        ) from error
    named = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, named, None) if named else None
    if kind is None:
        autos = (
            transformers.AutoModelForImageTextToText,
            transformers.AutoModelForMultimodalLM,
            transformers.AutoModelForCausalLM,
        )
        known = (auto for auto in autos if type(config) in auto._model_mapping)
        kind = next(known, transformers.AutoModelForMultimodalLM)
    model = kind.from_pretrained(folder, dtype=dtype, **options)
    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(f"folder must hold a model that generates, got {type(model).__name__}")
    return model


def language_part(model: Any) -> str:
    """Name of the decoder inside a model, "" if it cannot be told."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    names = (name for name, module in model.named_modules() if module is decoder)
    return next(names, "")


def _four_bits(dtype: str) -> Any:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ImportError(
            'load_in_4bit needs bitsandbytes; pip install "mm-sparse[quantize]" brings it',
            name="bitsandbytes",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        bnb_4bit_use_double_quant=True,
    )
