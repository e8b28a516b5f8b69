"""Audio files, manifests, trees, shards and messages of the speech recipe."""

import io
import json
import logging
import tarfile

import numpy as np
import pytest
import torch

from mm_sparse.recipes.data import audio_files
from mm_sparse.recipes.data.audio_files import SUFFIXES, MediaError, read_audio, resample
from mm_sparse.recipes.data.chat_messages import Messages
from mm_sparse.recipes.data.samples import RATE, Turn
from mm_sparse.recipes.data.speech_manifests import LibriSpeechTree, Manifest
from mm_sparse.recipes.data.splits import SPLITS, split_of
from mm_sparse.recipes.data.webdataset import TarShards
from mm_sparse.recipes.datasets.digit_dictation import WORDS

soundfile = pytest.importorskip("soundfile")

TEXTS = [f"{a} {b}" for a in WORDS[:6] for b in WORDS]


def tone(seconds=0.5, rate=RATE, note=440.0):
    return (0.5 * np.sin(2 * np.pi * note * np.arange(int(seconds * rate)) / rate)).astype("f4")


def audio_bytes(wave, rate=RATE, kind="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def write_manifest(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows))
    return str(path)


@pytest.fixture
def rows(tmp_path):
    """A tone for each text, by two voices."""
    found = []
    for number, text in enumerate([*TEXTS, *TEXTS]):
        soundfile.write(tmp_path / f"{number}.wav", tone(0.1 + number / 200), RATE)
        seconds = 0.1 + number / 200
        found.append({"audio_filepath": f"{number}.wav", "duration": seconds, "text": text})
    return found


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_every_format_and_rate_becomes_16_khz(tmp_path, suffix, rate):
    path = tmp_path / f"a{suffix}"
    stereo = np.stack([tone(1.0, rate), tone(1.0, rate)], 1)
    soundfile.write(path, stereo, rate)
    audio = read_audio(path)
    assert audio.ndim == 1
    assert abs(len(audio) - RATE) < 0.2 * RATE  # an encoder may pad
    spectrum = torch.fft.rfft(audio).abs()
    assert abs(int(spectrum.argmax()) * RATE / len(audio) - 440) < 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no audio", "a.wav: "),
        (b"", "a.wav: "),
        (audio_bytes(tone(0.0)), "a.wav: it holds no samples"),
        (audio_bytes(np.full(9, np.nan, "f4"), subtype="FLOAT"), "a.wav: it holds numbers"),
    ],
    ids=["corrupt", "empty-file", "no-samples", "nan"],
)
def test_a_file_without_audio_is_named(tmp_path, content, message):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(MediaError, match=message):
        read_audio(tmp_path / "a.wav")


def test_a_bad_file_is_skipped_counted_and_named_and_the_run_goes_on(tmp_path, rows, caplog):
    (tmp_path / "1.wav").write_bytes(b"no audio")
    (tmp_path / "2.wav").write_bytes(b"")
    data = Manifest(write_manifest(tmp_path, rows))
    with caplog.at_level(logging.WARNING):
        names = [data[index].name for index in range(4)]
        assert data[1].name == names[3]
    assert data.skipped == 2
    assert [name.rsplit(" ", 1)[1] for name in names] == ["0", "3", "3", "3"]
    assert len(caplog.records) == 2
    assert "skipped sample 1 so far" in caplog.text
    assert "row 1" in caplog.text
    assert "2.wav" in caplog.text


def test_no_readable_file_at_all_is_an_error(tmp_path, rows):
    (tmp_path / "0.wav").write_bytes(b"")
    data = Manifest(write_manifest(tmp_path, rows[:1]))
    with pytest.raises(
        MediaError, match=r"none of 1 samples can be read, the first: .*row 0.*0.wav"
    ):
        data[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "row 1: not JSON"),
        ("[]", "row 1: must be an object, got list"),
        ({"audio_filepath": None}, "row 1: 'audio_filepath' must be a str, got None"),
        ({"audio_filepath": "gone.wav"}, "row 1: audio_filepath '.*gone.wav' is not a file"),
        ({"duration": "2"}, "row 1: 'duration' must be a number, got '2'"),
        ({"duration": 0}, "row 1: 'duration' must be finite and positive, got 0"),
        ({"duration": float("nan")}, "row 1: 'duration' must be finite and positive, got nan"),
        ({"offset": -1}, "row 1: 'offset' must be finite and at least 0, got -1"),
        ({"offset": float("inf")}, "row 1: 'offset' must be finite and at least 0, got inf"),
        ({"offset": "1"}, "row 1: 'offset' must be a number, got '1'"),
        ({"text": " "}, "row 1: 'text' must hold words, got ' '"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, change, message):
    bad = change if isinstance(change, str) else {**rows[1], **change}
    with pytest.raises(ValueError, match=rf"rows\.jsonl: {message}"):
        Manifest(write_manifest(tmp_path, [rows[0], bad]))


def test_a_missing_field_is_named(tmp_path, rows):
    del rows[0]["text"]
    with pytest.raises(ValueError, match="row 0: 'text' must be a str, got nothing"):
        Manifest(write_manifest(tmp_path, rows))


def test_all_clips_of_a_text_are_in_one_split(tmp_path, rows):
    path = write_manifest(tmp_path, rows)
    texts = {}
    for split in SPLITS:
        clips = Manifest(path, split=split).clips
        texts[split] = {clip.text for clip in clips}
        assert len(clips) == 2 * len(texts[split])
    assert sum(map(len, texts.values())) == len(set.union(*texts.values())) == len(TEXTS)
    assert split_of("One  two") == split_of("one two")


def test_another_key_may_be_the_answer(tmp_path, rows):
    row = {**rows[0], "translation": "pomme"}
    data = Manifest(write_manifest(tmp_path, [row]), question="Translate.", answer="translation")
    assert [turn.content[-1] for turn in data[0].turns] == ["Translate.", "pomme"]
    assert data.size(0) == row["duration"]


def test_long_clips_are_left_out(tmp_path, rows):
    data = Manifest(write_manifest(tmp_path, rows), max_seconds=0.3)
    assert max(clip.duration for clip in data.clips) <= 0.3
    with pytest.raises(ValueError, match="must hold a clip with a text, got none"):
        Manifest(write_manifest(tmp_path, rows), max_seconds=0.01)


def test_a_librispeech_tree_is_read(tmp_path):
    folder = tmp_path / "19" / "198"
    folder.mkdir(parents=True)
    (folder / "19-198.trans.txt").write_text("19-198-0000 HELLO WORLD\n19-198-0001 AGAIN\n")
    soundfile.write(folder / "19-198-0000.flac", tone(0.5), RATE)
    soundfile.write(folder / "19-198-0001.flac", tone(1.0), RATE)
    data = LibriSpeechTree(str(tmp_path))
    assert [sample.turns[1].content[0] for sample in (data[0], data[1])] == ["hello world", "again"]
    assert [data.size(0), data.size(1)] == [0.5, 1.0]
    (folder / "19-198.trans.txt").write_text("19-198-0002 MISSING\n")
    with pytest.raises(ValueError, match=r"trans\.txt: line 0: 19-198-0002 has no file"):
        LibriSpeechTree(str(tmp_path))


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path)


def test_tar_shards_are_read_in_place(tmp_path):
    one = tar_of(tmp_path / "0.tar", {"a.flac": audio_bytes(tone(), kind="FLAC"), "a.txt": b"one"})
    members = {"b.json": b'{"text": "two"}', "b.wav": b"broken", "b.txt": b"not this"}
    members |= {"c.wav": audio_bytes(tone(1.0)), "c.json": b'{"text": "three"}'}
    data = TarShards([one, tar_of(tmp_path / "1.tar", members)])
    assert [clip.text for clip in data.clips] == ["one", "two", "three"]
    assert len(data[0].audio[0]) == RATE // 2
    assert data[1].turns[1].content == ("three",)
    assert data.skipped == 1
    assert data.size(2) > data.size(0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"one"}, "0.tar: a: must have an audio clip among .wav"),
        ({"a.wav": b"x"}, "0.tar: a: must have a txt or a json member"),
        ({"a.wav": b"x", "a.json": b'{"words": 1}'}, "0.tar: a: 'text' must be a str, got nothing"),
    ],
)
def test_a_bad_member_is_named(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        TarShards([tar_of(tmp_path / "0.tar", members)])


def test_what_is_no_tar_file_is_refused(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"0.tar: must be a tar file without compression"):
        TarShards([str(tmp_path / "0.tar")])


def message(role="user", **changes):
    parts = [{"type": "audio", "path": "a.wav"}, {"type": "text", "text": "What?"}]
    return {"role": role, "content": parts, **changes}


def test_messages_hold_audio_among_text(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), RATE)
    row = {
        "messages": [
            message("system", content="Hear."),
            message(),
            message("assistant", content="A tone."),
        ]
    }
    data = Messages(write_manifest(tmp_path, [row]))
    turns = data[0].turns
    assert turns[0].content == ("Hear.",)
    assert len(turns[1].content[0]) == RATE // 2
    assert turns[1].content[1] == "What?"
    assert turns[2] == Turn(("A tone.",), answer=True)


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        (7, "row 0: 'messages' must be a list, got 7"),
        ([message()], "row 0: needs a message of the assistant, got none"),
        ([message("bot")], "row 0: message 0: 'role' must be system, user or assistant"),
        ([message("assistant")], "row 0: message 0: an answer must be text, got audio in it"),
        ([message(content=[])], r"row 0: message 0: 'content' must be a text or a list, got \[\]"),
        (
            [message(content=[{"type": "video"}])],
            "'path' must be a video file, got None",
        ),
        ([message(content=[{"type": "smell"}])], "a part must be text, image, audio or video"),
        (
            [message(content=[{"type": "audio", "path": "b.wav"}])],
            "must be an audio file, got 'b.w",
        ),
        (
            [message(content=[{"type": "audio", "path": "a.wav", "duration": 0}])],
            "row 0: message 0: 'duration' must be finite and positive, got 0",
        ),
    ],
)
def test_bad_messages_are_named(tmp_path, messages, wanted):
    soundfile.write(tmp_path / "a.wav", tone(), RATE)
    with pytest.raises(ValueError, match=wanted):
        Messages(write_manifest(tmp_path, [{"messages": messages}]))


@pytest.fixture
def stairs(tmp_path):
    """Five seconds at 8 kHz, each of a level of its own, in wav, flac, ogg and mp3 files."""
    wave = np.repeat(np.float32([0.1, 0.2, 0.3, 0.4, 0.5]), 8000)
    for suffix in ("wav", "flac", "ogg"):
        soundfile.write(tmp_path / f"long.{suffix}", wave, 8000)
    return tmp_path


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_rows_are_segments_of_their_file(stairs, suffix):
    segment = {"audio_filepath": f"long.{suffix}", "duration": 1.0, "text": "one"}
    rows = [{**segment, "offset": float(number)} for number in range(5)]
    data = Manifest(write_manifest(stairs, [segment, *rows]))
    for index, level in enumerate((0.1, 0.1, 0.2, 0.3, 0.4, 0.5)):
        (wave,) = data[index].audio
        assert len(wave) == RATE
        assert float(wave[2000:-2000].mean()) == pytest.approx(level, abs=0.02)
    parts = [{"type": "audio", "path": f"long.{suffix}", "offset": 3, "duration": 0.5}]
    talk = {"messages": [message(content=parts), message("assistant", content="four")]}
    (wave,) = Messages(write_manifest(stairs, [talk]))[0].audio
    assert len(wave) == RATE // 2
    assert float(wave[2000:-2000].mean()) == pytest.approx(0.4, abs=0.02)


def test_a_segment_is_sought_and_not_read_from_the_start(stairs, monkeypatch):
    counts = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda *args, **kw: counts.append(args[1]) or read(*args, **kw)
    )
    read_audio(stairs / "long.wav", offset=4.0, duration=0.5)
    assert counts == [4000]


def test_a_segment_behind_the_end_is_skipped_and_named(stairs, caplog):
    row = {"audio_filepath": "long.wav", "duration": 1.0, "text": "one"}
    data = Manifest(write_manifest(stairs, [{**row, "offset": 5}, {**row, "offset": 4.5}]))
    with caplog.at_level(logging.WARNING):
        assert len(data[0].audio[0]) == RATE // 2
    assert "row 0: " in caplog.text
    assert "offset must be before its end at 5 s, got 5" in caplog.text


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"offset": -0.5}, "offset must be a finite number of at least 0, got -0.5"),
        ({"duration": 0}, "duration must be None or a finite number above 0, got 0"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
    ],
)
def test_bad_options_of_a_segment_are_refused(stairs, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        read_audio(stairs / "long.wav", **options)


def test_samples_are_limited_at_the_files_rate_and_at_16_khz(stairs):
    assert len(read_audio(stairs / "long.wav", max_samples=80_000)) == 80_000
    with pytest.raises(MediaError, match=r"long\.wav: .* up to max_samples=79999 samples"):
        read_audio(stairs / "long.wav", max_samples=79_999)
    assert len(read_audio(stairs / "long.wav", duration=0.1, max_samples=1600)) == 1600


@pytest.mark.parametrize("rate", [11_127, 15_999, 44_101, 655_349])
def test_odd_rates_take_no_gigabytes(tmp_path, rate):
    wave = np.sin(2 * np.pi * 440 * np.arange(rate // 4) / rate)
    soundfile.write(tmp_path / "odd.wav", wave, rate)
    audio = read_audio(tmp_path / "odd.wav")
    assert len(audio) == pytest.approx(RATE / 4, abs=2)
    assert int(torch.fft.rfft(audio).abs().argmax()) == 110


@pytest.mark.parametrize("rate", [8000, 11_025, 15_999, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("count", [0, 1, 777, 30_000])
def test_blocks_of_a_resampling_give_what_one_run_does(monkeypatch, rate, count):
    wave = torch.randn(2, count, generator=torch.Generator().manual_seed(0))
    whole = resample(wave, rate)
    monkeypatch.setattr(audio_files, "BLOCK", 1000)
    torch.testing.assert_close(resample(wave, rate), whole)


@pytest.mark.parametrize("rate", [999, 1_000_001])
def test_rates_of_damaged_headers_are_refused(tmp_path, rate):
    soundfile.write(tmp_path / "odd.wav", tone(0.01), rate)
    with pytest.raises(MediaError, match=rf"odd\.wav: its rate must be in .* Hz, got {rate}"):
        read_audio(tmp_path / "odd.wav")
