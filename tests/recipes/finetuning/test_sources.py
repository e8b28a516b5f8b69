"""Images, videos and tar files become batches of a checkpoint's processor."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from mm_sparse.recipes.data import LlavaJson, MediaError, Messages
from mm_sparse.recipes.data.webdataset import ImageShards
from mm_sparse.recipes.finetuning import ChatCollator, load_processor, messages_of
from mm_sparse.recipes.metrics import exact_match, token_f1
from tests.support.tiny_checkpoints import COLORS, write_checkpoint


def picture(folder: Path, name: str, color: str = "red", size: tuple[int, int] = (24, 16)) -> str:
    Image.new("RGB", size, COLORS[color]).save(folder / name)
    return name


def rows(folder: Path, *parts: dict, form: str = "lines") -> str:
    chat = {"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A square."},
    ]}  # fmt: skip
    path = folder / "rows.json"
    path.write_text(json.dumps([chat], indent=1) if form == "list" else json.dumps(chat))
    return str(path)


@pytest.mark.parametrize("form", ["lines", "list"])
@pytest.mark.parametrize("key", ["path", "url", "image"])
def test_images_keep_their_size(tmp_path: Path, form: str, key: str) -> None:
    name = picture(tmp_path, "a.png")
    sample = Messages(rows(tmp_path, {"type": "image", key: name}, form=form))[0]
    assert [turn.system for turn in sample.turns] == [True, False, False]
    assert sample.images[0].shape == (3, 16, 24)
    chat = messages_of(sample)
    assert [message["role"] for message in chat] == ["system", "user", "assistant"]
    assert chat[1]["content"][0]["image"].getpixel((0, 0)) == COLORS["red"]


def test_a_video_is_spread_over_its_frames(tmp_path: Path) -> None:
    names = [picture(tmp_path, f"{i}.png", color) for i, color in enumerate(COLORS)]
    part = {"type": "video", "path": names}
    clip = Messages(rows(tmp_path, part), frames=2)[0].turns[1].content[0]
    assert isinstance(clip, torch.Tensor)
    assert clip.shape == (2, 3, 16, 24)
    assert clip[:, :, 0, 0].tolist() == [[1, 0, 0], [0, 0, 1]]
    picture(tmp_path, "1.png", size=(8, 8))
    with pytest.raises(MediaError, match="frames of a video must have one size"):
        Messages(rows(tmp_path, part))[0]
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        Messages(rows(tmp_path, part), frames=0)


def test_rows_of_a_list_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[7]")
    with pytest.raises(ValueError, match="row 0: must be an object, got int"):
        Messages(str(tmp_path / "rows.json"))


def test_llava_rows_go_through_the_processor(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", "qwen2_5_vl")
    talk = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}]
    row = {"image": picture(tmp_path, "a.png", size=(32, 16)), "conversations": talk}
    (tmp_path / "llava.json").write_text(json.dumps([row]))
    samples = LlavaJson(str(tmp_path / "llava.json"), str(tmp_path), image_size=None)
    assert samples[0].images[0].shape == (3, 16, 32)
    batch = ChatCollator(load_processor(folder))([samples[0]])
    assert batch["image_grid_thw"].tolist() == [[1, 4, 8]]


def shard(folder: Path, members: dict[str, bytes]) -> list[str]:
    path = folder / "part-000.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return [str(path)]


def test_images_of_tar_files(tmp_path: Path) -> None:
    data = (tmp_path / picture(tmp_path, "a.png")).read_bytes()
    record = json.dumps({"text": "Red.", "question": "Color?"}).encode()
    paths = shard(tmp_path, {"a.png": data, "a.json": record})
    samples = ImageShards(paths, asked="question")
    assert len(samples) == 1
    turns = samples[0].turns
    assert turns[0].content[1] == "Color?"
    assert turns[1].content == ("Red.",)
    assert samples[0].images[0].shape == (3, 16, 24)
    paths = shard(tmp_path, {"a.png": data, "a.txt": b"Red."})
    assert ImageShards(paths)[0].turns[0].content[1] == "Describe the image."
    with pytest.raises(ValueError, match="must have a json member with 'question'"):
        ImageShards(paths, asked="question")
    with pytest.raises(ValueError, match="must have an image among"):
        ImageShards(shard(tmp_path, {"a.txt": b"Red."}))
    with pytest.raises(ValueError, match="must hold an image with a text, got none"):
        ImageShards([])


def test_answers_are_compared_by_words() -> None:
    assert exact_match("A cat.", "a  cat")
    assert not exact_match("a dog", "a cat")
    assert token_f1("a black cat", "a cat") == pytest.approx(0.8)
    assert token_f1("", "a cat") == 0
    assert token_f1("", "") == 1
