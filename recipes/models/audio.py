"""Towers for audio, and the projector that makes audio tokens of their frames.

Every tower gives a frame for each 320 samples (20 ms) of 16 kHz.

A audio clips, S samples, F frames, C width of the tower, E width of the language model
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from mm_sparse.recipes.data import RATE
from mm_sparse.recipes.models.language import from_pretrained
from mm_sparse.recipes.models.vision import spread

HOP = 320
"""Samples that a frame covers."""
Kind = Literal["conformer", "whisper", "wav2vec2"]


class LogMel(nn.Module):
    """Whisper's features: log10 of a mel spectrogram, floored at 8 below its maximum.

    (A, S) -> (A, bins, S / 160). Source: Radford et al., 2022, "Robust speech recognition via
    large-scale weak supervision", section 2.2.
    """

    def __init__(self, bins: int = 80) -> None:
        super().__init__()
        from torchaudio.transforms import MelSpectrogram

        self.spectrogram = MelSpectrogram(
            RATE, n_fft=400, hop_length=HOP // 2, n_mels=bins, norm="slaney", mel_scale="slaney"
        )

    def forward(self, waveforms: Tensor) -> Tensor:
        mel = self.spectrogram(waveforms.float())[..., :-1].clamp(min=1e-10).log10()
        return (mel.maximum(mel.amax((1, 2), keepdim=True) - 8) + 4) / 4


class AudioTower(nn.Module):
    """(A, S) waveforms and their (A,) lengths to (A, F, C), F at least that of the longest.

    The module that attends is `backbone`.
    """

    backbone: Any
    width: int
    """Channels of a frame."""
    longest: int | None = None
    """Samples that an audio clip may have."""

    @property
    def shortest(self) -> int:
        """Samples that the longest clip of a batch must have."""
        return 1

    def frames(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        if waveforms.ndim != 2 or lengths.shape != waveforms.shape[:1]:
            raise ValueError(
                f"waveforms and lengths must be (A, S) and (A,), got {tuple(waveforms.shape)} and "
                f"{tuple(lengths.shape)}"
            )
        longest = int(lengths.max())
        if longest < self.shortest:
            raise ValueError(
                f"waveforms must have at least {self.shortest} samples ({self.shortest / RATE:g} "
                f"s) in the longest clip of a batch, got {longest} ({longest / RATE:g} s)"
            )
        if self.longest is not None and longest > self.longest:
            raise ValueError(
                f"waveforms must have up to {self.longest} samples ({self.longest / RATE:g} s), "
                f"got {longest}"
            )
        # What the batch pads beyond its longest clip says nothing.
        whole = -(-longest // HOP) * HOP
        waveforms = pad(waveforms[:, :whole], (0, max(whole - waveforms.shape[1], 0)))
        return self.frames(waveforms, lengths)


class ConformerTower(AudioTower):
    """Log-mel bins, two convolutions, torchaudio's Conformer; it learns from scratch.

    Source of the blocks: Gulati et al., 2020, "Conformer".
    """

    def __init__(
        self, *, width: int = 64, depth: int = 2, heads: int = 4, kernel: int = 31, bins: int = 40
    ) -> None:
        super().__init__()
        from torchaudio.models import Conformer

        self.width = width
        self.mel = LogMel(bins)
        self.first = nn.Conv1d(bins, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.backbone = Conformer(width, heads, 2 * width, depth, kernel)

    @property
    def shortest(self) -> int:
        # Batch normalisation learns from no single frame.
        return HOP + 1 if self.training else 1

    def frames(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        x = gelu(self.second(gelu(self.first(self.mel(waveforms)))))
        return self.backbone(x.transpose(1, 2), -(-lengths // HOP))[0]


class WhisperTower(AudioTower):
    """A Whisper encoder of transformers. Every clip is heard in its whole window."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.backbone = encoder
        self.width = encoder.config.d_model
        self.longest = encoder.config.max_source_positions * HOP
        self.mel = LogMel(encoder.config.num_mel_bins)

    def frames(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        window = pad(waveforms, (0, int(self.longest or 0) - waveforms.shape[1]))
        mel = self.mel(window).to(self.backbone.conv1.weight.dtype)
        return self.backbone(mel).last_hidden_state


class Wav2Vec2Tower(AudioTower):
    """A wav2vec2 (or HuBERT) model of transformers on normalised waveforms."""

    # Its convolutions see 400 samples for the first frame and 320 for each more.
    EXTRA = 80

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model
        self.width = model.config.hidden_size

    @property
    def shortest(self) -> int:
        config = self.backbone.config
        masks = self.training and config.apply_spec_augment and config.mask_time_prob > 0
        return config.mask_time_length * HOP if masks else 1

    def frames(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
        count = lengths[:, None]
        mean = waveforms.sum(1, keepdim=True) / count
        centred = (waveforms - mean) * inside
        normal = centred / (centred.square().sum(1, keepdim=True) / count + 1e-7).sqrt()
        whole = -(-lengths // HOP) * HOP + self.EXTRA
        normal = pad(normal, (0, self.EXTRA))
        heard = torch.arange(normal.shape[1], device=normal.device) < whole[:, None]
        return self.backbone(normal, attention_mask=heard.long()).last_hidden_state


class FrameClassifier(AudioTower):
    """A tower whose classifier names what each frame belongs to: (A, F, classes) probabilities."""

    def __init__(self, tower: AudioTower, classes: int) -> None:
        super().__init__()
        self.tower, self.head = tower, nn.Linear(tower.width, classes)
        self.width, self.longest = classes, tower.longest

    @property
    def shortest(self) -> int:
        return self.tower.shortest

    @property
    def backbone(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The module that attends."""
        return self.tower.backbone

    def logits(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """(A, S) waveforms and their (A,) lengths to logits (A, F, classes)."""
        return self.head(self.tower(waveforms, lengths))

    def frames(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        return self.logits(waveforms, lengths).softmax(-1)


@dataclass(frozen=True)
class AudioConfig:
    """A tower for audio. `options` go to its architecture."""

    kind: Kind = "conformer"
    """A mel front end from scratch, or an encoder of transformers."""
    path: str | None = None
    """Folder or name for `from_pretrained`; "tiny.en" or "base": those of
    `recipes.pretrained.whisper`, or a .safetensors file that it wrote; None: scratch."""
    weights: str | None = None
    """A safetensors file with the tower's weights, as `run.pretrain_audio_tower` writes it."""
    classes: int = 0
    """Hand over the probabilities of this many classes for each frame, not features, if above 0."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of `ConformerTower`, or fields of the config of transformers."""

    def build(self) -> AudioTower:
        """The tower, with its weights if it has any."""
        if self.classes < 0:
            raise ValueError(f"classes must be at least 0, got {self.classes}")
        tower = self._tower()
        if self.classes:
            tower = FrameClassifier(tower, self.classes)
        # On a command line, null of a nested field comes as a word.
        if self.weights not in (None, "None"):
            if not Path(self.weights).is_file():
                raise ValueError(f"weights must be None or a file, got {self.weights!r}")
            tower.load_state_dict(load_file(self.weights))
        return tower

    def _tower(self) -> AudioTower:
        if self.kind == "conformer":
            if self.path is not None:
                raise ValueError(f"path must be None for a conformer, got {self.path!r}")
            return ConformerTower(**self.options)
        if self.kind == "whisper":
            return WhisperTower(_whisper(self.path, self.options))
        if self.kind == "wav2vec2":
            return Wav2Vec2Tower(_wav2vec2(self.path, self.options))
        raise ValueError(f"kind must be conformer, whisper or wav2vec2, got {self.kind!r}")


def _whisper(path: str | None, options: dict[str, Any]) -> Any:
    from transformers import WhisperConfig, WhisperModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from mm_sparse.recipes.pretrained import FILES, load_encoder

    if path is None:
        return WhisperEncoder(WhisperConfig(**options))
    stored = path.endswith(".safetensors")
    if stored and not Path(path).is_file():
        raise ValueError(f"path must be a file if it ends with .safetensors, got {path!r}")
    if stored or path in FILES:
        return load_encoder(path)
    return from_pretrained(WhisperModel, path, **options).encoder


def _wav2vec2(path: str | None, options: dict[str, Any]) -> Any:
    from transformers import AutoModel, Wav2Vec2Config, Wav2Vec2Model

    # Sparse attention has no dropout on its weights, and refuses a layer that wants some.
    options = {"attention_dropout": 0.0, **options}
    if path is not None:
        return from_pretrained(AutoModel, path, **options)
    return Wav2Vec2Model(Wav2Vec2Config(**options))


class FrameProjector(nn.Module):
    """Frames of a tower to audio tokens: `stack` neighbours become one, then an MLP.

    `positions` adds learned vectors for the time, so many over `seconds`, linear between them; 0
    leaves that to the tower and the language model. Later tokens have the last one's.
    """

    def __init__(
        self, width: int, out: int, *, stack: int = 2, positions: int = 0, seconds: float = 30.0
    ) -> None:
        super().__init__()
        for name, value, low in (("stack", stack, 1), ("positions", positions, 0)):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if seconds <= 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        self.stack = stack
        inner = width * stack
        self.mlp = nn.Sequential(
            nn.LayerNorm(inner), nn.Linear(inner, out), nn.GELU(), nn.Linear(out, out)
        )
        self.places = nn.Parameter(torch.randn(positions, out) / 5) if positions else None
        self.window = max(round(seconds * RATE / self.samples_per_token), 1)

    @property
    def samples_per_token(self) -> int:
        """Samples that a token covers."""
        return HOP * self.stack

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(A, F, C) and the samples of each clip (A,) -> (tokens of all clips, E)."""
        count = -(-lengths // self.samples_per_token)
        longest = int(count.max()) * self.stack
        frames = pad(frames[:, :longest], (0, 0, 0, max(longest - frames.shape[1], 0)))
        tokens = self.mlp(frames.unflatten(1, (-1, self.stack)).flatten(2))  # (A, F / stack, E)
        if self.places is not None:
            place = torch.arange(tokens.shape[1], device=tokens.device).clamp(max=self.window - 1)
            tokens = tokens + spread(self.places, self.window)[place]
        inside = torch.arange(tokens.shape[1], device=tokens.device) < count[:, None]
        return tokens[inside]


@dataclass(frozen=True)
class FrameProjectorConfig:
    """Arguments of `FrameProjector`."""

    stack: int = 2
    """Frames of 20 ms that make a token."""
    positions: int = 0
    seconds: float = 30.0

    def build(self, width: int, out: int) -> FrameProjector:
        """The projector between two widths."""
        return FrameProjector(
            width, out, stack=self.stack, positions=self.positions, seconds=self.seconds
        )
