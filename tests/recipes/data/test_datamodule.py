"""The data sets and the data module of the vision-language recipe."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mm_sparse.recipes.data.datamodule import SampleData
from mm_sparse.recipes.data.llava import LlavaJson
from mm_sparse.recipes.data.samples import CHATML, ConcatSamples
from mm_sparse.recipes.data.splits import SPLITS
from mm_sparse.recipes.datasets.digits import DigitCanvases, DigitTokenizer, digit_images
from mm_sparse.recipes.datasets.stamps import StampGrids, find_stamps


def test_no_digit_image_is_in_two_splits():
    parts = [{p.tobytes() for p in digit_images(split)[0]} for split in SPLITS]
    assert len(parts[0] | parts[1] | parts[2]) == sum(len(part) for part in parts)
    assert sum(len(digit_images(split)[1]) for split in SPLITS) == 1797


def test_canvas_is_the_same_for_the_same_seed_only():
    one, two = DigitCanvases(seed=1), DigitCanvases(seed=1)
    assert torch.equal(one[5].images[0], two[5].images[0])
    assert one[5].turns[1] == two[5].turns[1]
    for other in (DigitCanvases(seed=2)[5], one[6]):
        assert not torch.equal(one[5].images[0], other.images[0])


def test_answers_name_the_digit_in_the_cell():
    data = DigitCanvases("test", 10, rows=2, columns=3, cell=10, questions=6)
    images, labels = digit_images("test")
    label_of = {p.tobytes(): str(label) for p, label in zip(images, labels, strict=True)}
    for index in range(len(data)):
        turns = data[index].turns
        pixels = data[index].images[0][0].numpy()
        assert pixels.shape == (20, 30)
        asked = set()
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            r, c = (int(ch) - 1 for ch in str(question.content[-1]) if ch.isdigit())
            asked.add((r, c))
            cell = pixels[r * 10 : r * 10 + 10, c * 10 : c * 10 + 10]
            places = [cell[y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
            assert answer.content[0] in {
                label_of.get(np.ascontiguousarray(place).tobytes()) for place in places
            }
        assert len(asked) == 6


def test_scale_repeats_pixels():
    small, large = DigitCanvases()[0].images[0], DigitCanvases(scale=2)[0].images[0]
    assert large.shape == (3, 96, 96)
    assert torch.equal(large[:, ::2, 1::2], small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": 7}, "cell must be at least 8, got 7"),
        ({"questions": 17}, r"questions must be in \[1, 16\], got 17"),
        ({"rows": 0}, r"rows must be in \[1, 99\], got 0"),
        ({"split": "dev"}, "split must be one of .*, got 'dev'"),
    ],
)
def test_digits_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        DigitCanvases(**options)


def test_index_past_the_end_is_refused():
    with pytest.raises(IndexError, match=r"index must be in \[0, 3\), got 3"):
        DigitCanvases(length=3)[3]


def row(**changes):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    return {"id": "x1", "image": "cat.png", "conversations": turns} | changes


@pytest.fixture
def llava(tmp_path):
    Image.new("RGBA", (6, 3), (255, 0, 0, 255)).save(tmp_path / "cat.png")
    Image.new("L", (3, 6), 0).save(tmp_path / "dog.png")
    (tmp_path / "broken.png").write_text("no image")

    def load(*rows):
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return LlavaJson(str(tmp_path / "rows.json"), str(tmp_path), image_size=8)

    return load


def test_llava_reads_images_at_any_place_and_text_alone(llava):
    turns = [
        {"from": "human", "value": "See <image> and <image>?"},
        {"from": "gpt", "value": "Yes."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "No."},
    ]
    text = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    data = llava(row(image=["cat.png", "dog.png"], conversations=turns), {"conversations": text})
    first, cat, middle, dog, last = data[0].turns[0].content
    assert (first, middle, last) == ("See ", " and ", "?")
    assert isinstance(cat, torch.Tensor)
    assert isinstance(dog, torch.Tensor)
    assert cat.shape == dog.shape == (3, 8, 8)
    assert cat[:, 4, 4].tolist() == [1, 0, 0]
    assert cat[:, 0, 0].tolist() == [1, 1, 1]
    assert [turn.answer for turn in data[0].turns] == [False, True, False, True]
    assert data[1].images == []
    assert len(data) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(image="gone.png"), "image '.*gone.png' is not a file"),
        (row(image=None), "has 1 <image> tags and 0 images"),
        (row(image=["cat.png", "dog.png"]), "has 1 <image> tags and 2 images"),
        (row(image=7), "'image' must be a name or a list of names, got 7"),
        (row(conversations=[]), r"'conversations' must be a list with turns, got \[\]"),
        ({"id": "x1"}, "'conversations' must be a list with turns, got None"),
        (row(conversations=[{"from": "gpt"}]), "turn 0: 'value' must be a string, got nothing"),
        (row(conversations=[{"value": "a"}]), "turn 0: 'from' must be a string, got nothing"),
        (row(conversations=[{"from": "me", "value": ""}]), "turn 0: 'from' must be one of human"),
        (row(conversations=[{"from": "human", "value": "a"}]), "needs a turn from gpt"),
        (
            row(conversations=[{"from": "gpt", "value": "<image>"}]),
            "turn 0: <image> must not stand",
        ),
        (row(conversations=["a"]), "turn 0 must be an object, got 'a'"),
    ],
)
def test_bad_row_error_names_file_and_row(llava, bad, message):
    with pytest.raises(ValueError, match=rf"rows.json: row 1 \(id 'x1'\): {message}"):
        llava(row(), bad)


def test_unreadable_image_is_skipped_counted_and_named_with_file_and_row(llava, caplog):
    data = llava(row(), row(image="broken.png"))
    with caplog.at_level("WARNING"):
        assert [data[1].name, data[1].name] == [data[0].name] * 2
    assert data.skipped == len(caplog.records) == 1
    assert re.search(r"rows.json: row 1 \(id 'x1'\): image .*broken.png", caplog.text)
    with pytest.raises(ValueError, match=r"none of 1 samples .* row 0 \(id 'x1'\): image .*broken"):
        llava(row(image="broken.png"))[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "bad.json: not JSON"),
        ("{}", "bad.json: the file must hold a list, got dict"),
        ("[3]", "bad.json: row 0: must be an object, got int"),
    ],
)
def test_bad_file_is_named(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        LlavaJson(str(tmp_path / "bad.json"))


@pytest.fixture
def root(tmp_path):
    """Nine stamps of plain colours, laid out as the package lays them out."""
    for kind in range(9):
        folder = tmp_path / ("even" if kind % 2 == 0 else "odd")
        folder.mkdir(exist_ok=True)
        Image.new("RGBA", (10, 10), (0, kind * 20, 0, 255)).save(folder / f"{kind}.png")
        (folder / f"{kind}.txt").write_text(f"Kind {kind}.\nde.utf8=Art {kind}.\n")
    (tmp_path / "even" / "drawn.txt").write_text("Without a PNG.")
    return str(tmp_path)


def test_stamps_have_captions_and_categories(root):
    found = find_stamps(root)
    assert [stamp.caption for stamp in found] == [f"Kind {k}" for k in (0, 2, 4, 6, 8, 1, 3, 5, 7)]
    assert {stamp.category for stamp in found} == {"even", "odd"}


def test_grid_answers_name_the_stamp_in_the_cell(root):
    data = StampGrids("validation", 5, side=3, image_size=32, questions=9, root=root)
    order = ["first", "second", "third"]
    for index in range(5):
        turns, pixels = data[index].turns, data[index].images[0]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            words = str(question.content[-1]).replace(",", "").rstrip("?").split()
            r, c = (order.index(word) for word in words if word in order)
            green = pixels[1, r * 10 + 5, c * 10 + 5] * 255
            assert answer.content == (f"Kind {round(float(green) / 20)}",)
    assert torch.equal(data[1].images[0], data[1].images[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 4}, "kinds must leave at least 16 captions, got 9"),
        ({"side": 9}, r"side must be in \[1, 8\], got 9"),
        ({"side": 3, "skip": ("odd",)}, "kinds must leave at least 9 captions, got 5"),
        ({"side": 2, "questions": 5}, r"questions must be in \[1, 4\], got 5"),
        ({"split": "test"}, "split must be 'train' or 'validation', got 'test'"),
    ],
)
def test_grids_refuse(root, options, message):
    with pytest.raises(ValueError, match=message):
        StampGrids(**{"root": root, **options})


def test_missing_stamps_name_the_package(tmp_path):
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
            find_stamps(place)


def test_data_module_gives_batches():
    held = DigitCanvases("test", 5, questions=1)
    data = SampleData(
        DigitCanvases(length=7), DigitTokenizer(), patch_size=4, validation=held, batch_size=4
    )
    sizes = [len(batch["input_ids"]) for batch in data.train_dataloader()]
    assert sizes == [4, 3]
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    batch = next(iter(loader))
    assert batch["image_grids"] == [(12, 12)] * 4
    assert int((batch["input_ids"] == data.tokenizer.image_id).sum()) == 4 * 144
    assert batch["answer_index"].max() == 3


def test_data_module_without_held_out_samples():
    data = SampleData(DigitCanvases(), DigitTokenizer(), patch_size=4)
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="test must be given"):
        data.test_dataloader()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SampleData(DigitCanvases(), DigitTokenizer(), patch_size=4, batch_size=0)


def test_a_course_reads_its_sets_one_after_the_other_unless_shuffled():
    parts = [DigitCanvases("train", n, rows=n, columns=n, questions=1) for n in (2, 3)]
    course = ConcatSamples([*parts])
    assert len(course) == 5
    assert [course[i].name for i in range(5)] == [s.name for part in parts for s in part_of(part)]
    with pytest.raises(IndexError, match=r"index must be in \[0, 5\), got 5"):
        course[5]
    data = SampleData(
        ConcatSamples([DigitCanvases("train", n, rows=n, columns=n, questions=1) for n in (2, 4)]),
        DigitTokenizer(),
        patch_size=4,
        batch_size=2,
        shuffle=False,
    )
    sides = [batch["pixel_values"].shape[-1] for batch in data.train_dataloader()]
    assert sides == [24, 48, 48]


def part_of(samples):
    return [samples[i] for i in range(len(samples))]


def test_a_course_of_nothing_is_refused():
    with pytest.raises(ValueError, match="parts must hold at least one set of samples, got none"):
        ConcatSamples([])


def test_a_template_may_be_named():
    data = SampleData(DigitCanvases(length=1), DigitTokenizer(), template="chatml", patch_size=4)
    assert data.collator.template == CHATML
    with pytest.raises(ValueError, match="template must be a Template or 'chatml', got 'alpaca'"):
        SampleData(DigitCanvases(length=1), DigitTokenizer(), template="alpaca", patch_size=4)
