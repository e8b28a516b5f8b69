"""Audio encoders by name: audio in, frames and their rate out, attention sparse if wanted.

B clips, S samples of a waveform, L frames of features, F features, N frames of tokens, C width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mm_sparse.config import SparseConfig
from mm_sparse.encoders.backbones.audio import (
    AudioEncoder,
    ConformerAudio,
    TorchaudioAudio,
    TransformersAudio,
)
from mm_sparse.encoders.base import choose, made_sparse
from mm_sparse.scorers import Scorer

__all__ = ["AudioEncoder", "create_audio_encoder"]


def create_audio_encoder(
    name: str,
    source: str = "torchaudio",
    sparse: SparseConfig | None = None,
    pretrained: bool = False,
    *,
    input_rate: float | None = None,
    strict: bool = True,
    scorer: str | Callable[..., Scorer] | None = None,
    **options: Any,
) -> AudioEncoder:
    """An audio encoder whose forward takes a batch, and lengths if padded, and gives tokens, spec.

    It comes in evaluation mode. Models of the wav2vec 2.0 family take waveforms (B, S), Whisper
    takes log-mel features (B, F, L), torchaudio's Conformer features (B, L, F).

    Args:
        name: for torchaudio a function of `torchaudio.models` ("wav2vec2_base", "hubert_large",
            "wav2vec2_model", ...) or "conformer"; for transformers a model type ("whisper",
            "wav2vec2", "hubert", ...), or a folder or name for `from_pretrained`.
        source: "torchaudio" or "transformers".
        sparse: how its attention is sparse; None leaves it dense, for a later `sparsify`.
        pretrained: load weights, which downloads them unless `name` is a folder; for torchaudio
            those of the pipeline of that name.
        input_rate: samples, or frames of features, in a second; 16000 and 100 if None.
        strict, scorer: as in `mm_sparse.sparsify`.
        options: further arguments of the architecture.
    Raises:
        ValueError: `sparse` is given and a layer cannot be served; the message names it.
    """
    make = choose("source", source, {"torchaudio": _torchaudio, "transformers": _transformers})
    kind, backbone = make(name, pretrained, options)
    encoder = kind(backbone) if input_rate is None else kind(backbone, input_rate)
    return made_sparse(encoder.eval(), sparse, strict=strict, scorer=scorer)


Made = tuple[type[AudioEncoder], Any]


def _torchaudio(name: str, pretrained: bool, options: dict[str, Any]) -> Made:
    import torchaudio

    if pretrained:
        bundle: Any = getattr(torchaudio.pipelines, name.upper(), None)
        if not hasattr(bundle, "get_model"):
            raise ValueError(f"name must be a pipeline of torchaudio in lower case, got {name!r}")
        return TorchaudioAudio, bundle.get_model(**options)
    if name == "conformer":
        return ConformerAudio, torchaudio.models.Conformer(**options)
    make = getattr(torchaudio.models, name, None)
    if "emformer" in name:
        raise ValueError(
            "name must not be an Emformer: it computes attention in its own arithmetic"
        )
    if make is None or not name.startswith(("wav2vec2", "hubert", "wavlm")) or "pretrain" in name:
        raise ValueError(
            "name must be a wav2vec2, hubert or wavlm function of torchaudio.models or "
            f"'conformer', got {name!r}"
        )
    return TorchaudioAudio, make(**options)


def _transformers(name: str, pretrained: bool, options: dict[str, Any]) -> Made:
    from mm_sparse.encoders.backbones.hf import load_model

    return TransformersAudio, load_model(name, pretrained, options)
