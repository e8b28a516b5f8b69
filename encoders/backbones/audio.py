"""Audio transformers of torchaudio and transformers behind one forward.

B clips, S samples of a waveform, L frames of features, F features, N frames of tokens, C width
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mm_sparse.encoders.base import Encoder
from mm_sparse.encoders.interleaving import TokenSpec
from mm_sparse.modality import Modality

SAMPLES, FEATURES = 16000.0, 100.0


class AudioEncoder(Encoder):
    """Waveforms (B, S), or features, to tokens.

    Args:
        backbone: the library's module.
        input_rate: samples, or frames of features, in a second.
    """

    dimensions = 2
    """Of a batch."""
    time = 1
    """The dimension that is time."""

    def __init__(self, backbone: nn.Module, input_rate: float = SAMPLES) -> None:
        super().__init__(backbone)
        if input_rate <= 0:
            raise ValueError(f"input_rate must be positive, got {input_rate}")
        self.input_rate = float(input_rate)

    @property
    def stride(self) -> int:
        """Samples, or frames of features, from one token to the next."""
        raise NotImplementedError

    @property
    def rate(self) -> float:
        """Tokens in a second (Hz)."""
        return self.input_rate / self.stride

    def length_problem(self, length: int) -> str | None:
        """What lengths the backbone takes, if not this one."""
        return None

    def encode(self, audio: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, C) and how many of each row are no padding."""
        raise NotImplementedError

    def forward(self, audio: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, TokenSpec]:
        """Tokens (B, N, C) of a batch and their `TokenSpec`: rate, and lengths if some were given.

        Args:
            audio: (B, S) waveforms or a batch of features, as the backbone takes them.
            lengths: (B,) samples, or frames of features, of each row that are no padding.
        """
        if audio.ndim != self.dimensions:
            want = {2: "(B, samples)", 3: "features of 3 dimensions"}[self.dimensions]
            raise ValueError(f"audio must be {want}, got shape {tuple(audio.shape)}")
        length = audio.shape[self.time]
        problem = self.length_problem(length)
        if problem is not None:
            raise ValueError(
                f"audio must be {problem}, got {length} for {type(self.backbone).__name__}"
            )
        if lengths is not None:
            if lengths.shape != audio.shape[:1] or lengths.is_floating_point():
                raise ValueError(
                    f"lengths must be {len(audio)} integers, got {lengths.dtype} of shape "
                    f"{tuple(lengths.shape)}"
                )
            if len(lengths) and (int(lengths.min()) < 1 or int(lengths.max()) > length):
                raise ValueError(f"lengths must be in [1, {length}], got {lengths.tolist()}")
        tokens, token_lengths = self.encode(audio, lengths)
        if token_lengths is not None:
            token_lengths = token_lengths.clamp(max=tokens.shape[1])
        return tokens, TokenSpec(Modality.AUDIO, rate=self.rate, lengths=token_lengths)


class TorchaudioAudio(AudioEncoder):
    """wav2vec 2.0, HuBERT or WavLM of torchaudio, without the layer behind the encoder."""

    def __init__(self, backbone: nn.Module, input_rate: float = SAMPLES) -> None:
        super().__init__(backbone, input_rate)
        for needed in ("feature_extractor", "encoder"):
            if not hasattr(self.model, needed):
                raise TypeError(
                    f"backbone must be a Wav2Vec2Model of torchaudio with `{needed}`, "
                    f"got {type(backbone).__name__} without it"
                )

    @property
    def model(self) -> Any:
        """The backbone, or what a pipeline wraps."""
        return getattr(self.backbone, "model", self.backbone)

    @property
    def width(self) -> int:
        return self.model.encoder.feature_projection.projection.out_features

    @property
    def stride(self) -> int:
        return prod(layer.stride for layer in self.model.feature_extractor.conv_layers)

    def encode(self, audio: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if getattr(self.backbone, "normalize_waveform", False):
            audio = layer_norm(audio, audio.shape)
        frames, token_lengths = self.model.feature_extractor(audio, lengths)
        return self.model.encoder(frames, token_lengths), token_lengths


class ConformerAudio(AudioEncoder):
    """torchaudio's Conformer, on features (B, L, F)."""

    dimensions = 3

    def __init__(self, backbone: nn.Module, input_rate: float = FEATURES) -> None:
        super().__init__(backbone, input_rate)
        if not hasattr(backbone, "conformer_layers"):
            raise TypeError(
                "backbone must be a Conformer of torchaudio, got "
                f"{type(backbone).__name__} without `conformer_layers`"
            )

    @property
    def width(self) -> int:
        return self.backbone.conformer_layers[0].final_layer_norm.normalized_shape[0]

    @property
    def stride(self) -> int:
        return 1

    def encode(self, audio: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        full = audio.shape[1]
        given = torch.full((len(audio),), full, device=audio.device) if lengths is None else lengths
        # The Conformer makes its mask as long as the longest row.
        tokens, token_lengths = self.backbone(audio[:, : int(given.max())], given)
        return tokens, None if lengths is None else token_lengths


class TransformersAudio(AudioEncoder):
    """An audio encoder of transformers, or the encoder of a model that also writes text."""

    def __init__(self, backbone: nn.Module, input_rate: float | None = None) -> None:
        made: Any = backbone
        if getattr(made.config, "is_encoder_decoder", False) and hasattr(made, "get_encoder"):
            made = made.get_encoder()
        mel = made.main_input_name == "input_features" and hasattr(made, "conv2")
        wave = made.main_input_name == "input_values" and hasattr(made.config, "conv_stride")
        if not (mel or wave):
            raise TypeError(
                "backbone must be an audio model of transformers like wav2vec 2.0 (`input_values`, "
                "`conv_stride`) or like Whisper (`input_features`, `conv1`, `conv2`), got "
                f"{type(made).__name__} with `{made.main_input_name}`"
            )
        super().__init__(made, input_rate or (FEATURES if mel else SAMPLES))
        self.mel = mel

    @property
    def dimensions(self) -> int:  # pyright: ignore
        return 3 if self.mel else 2

    @property
    def time(self) -> int:  # pyright: ignore
        return 2 if self.mel else 1

    @property
    def width(self) -> int:
        config = self.backbone.config
        return config.d_model if self.mel else config.hidden_size

    @property
    def stride(self) -> int:
        if self.mel:
            return self.convolved * self.pooled
        return prod(self.backbone.config.conv_stride)

    @property
    def convolved(self) -> int:
        """Frames of features of a position."""
        return prod(getattr(self.backbone, name).stride[0] for name in ("conv1", "conv2"))

    @property
    def pooled(self) -> int:
        """Positions of a token: Qwen2-Audio averages behind the layers."""
        pooler = getattr(self.backbone, "avg_pooler", None)
        return 1 if pooler is None else pooler.stride[0]

    def length_problem(self, length: int) -> str | None:
        places = getattr(self.backbone.config, "max_source_positions", None)
        if not self.mel or places is None or length == places * self.convolved:
            return None
        frames = places * self.convolved
        return (
            f"padded or cut to {frames} frames of features ({frames / self.input_rate:g} s), for "
            "which alone there are positions"
        )

    def encode(self, audio: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.mel:
            # Whisper hears padding as silence and masks none of it.
            tokens = self.backbone(audio).last_hidden_state
            return tokens, None if lengths is None else -(-lengths // self.convolved) // self.pooled
        if lengths is None:
            return self.backbone(audio).last_hidden_state, None
        mask = torch.arange(audio.shape[1], device=audio.device) < lengths[:, None]
        tokens = self.backbone(audio, attention_mask=mask.long()).last_hidden_state
        return tokens, self.backbone._get_feat_extract_output_lengths(lengths)
