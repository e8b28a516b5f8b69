"""Turns, tokenizers and the collator of the vision-language recipe."""

import logging

import pytest
import torch

from mm_sparse.recipes.data.collate import Collator
from mm_sparse.recipes.data.samples import CHATML, Sample, Template, Turn
from mm_sparse.recipes.data.tokenizers import HFTokenizer, WordTokenizer
from mm_sparse.recipes.datasets.digits import DigitTokenizer

WORDS = WordTokenizer(["a", "b", "c", "?"])
IMAGE, EOS, PAD = WORDS.image_id, WORDS.eos_id, WORDS.pad_id
A, B, C, Q = WORDS.encode("a b c ?")


def image(height=4, width=8):
    return torch.rand(3, height, width)


def sample(*turns, name="s"):
    return Sample(tuple(turns), name)


def collate(*samples, **options):
    return Collator(WORDS, **{"patch_size": 4, "max_length": 64, **options})(list(samples))


def test_collator_places_images_and_supervises_answers_only():
    one = sample(
        Turn(("a", image(), "?")),
        Turn(("b",), answer=True),
        Turn(("c", image())),
        Turn(("a b",), answer=True),
    )
    batch = collate(one, sample(Turn(("c",)), Turn(("c",), answer=True)))
    ids = [A, IMAGE, IMAGE, Q, B, EOS, C, IMAGE, IMAGE, A, B, EOS]
    index = [-1, -1, -1, -1, 0, 0, -1, -1, -1, 1, 1, 1]
    assert batch["input_ids"].tolist() == [ids, [C, C, EOS] + [PAD] * 9]
    assert batch["answer_index"].tolist() == [index, [-1, 2, 2] + [-1] * 9]
    assert batch["attention_mask"].sum(1).tolist() == [12, 3]
    learned = batch["labels"] != -100
    assert torch.equal(learned, batch["answer_index"] >= 0)
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
    assert batch["image_grids"] == [(1, 2), (1, 2)]
    assert torch.equal(batch["pixel_values"], torch.stack(one.images))


def test_text_only_batch_has_no_images():
    batch = collate(sample(Turn(("a",), answer=True)))
    assert batch["pixel_values"].shape[:2] == (0, 3)
    assert batch["image_grids"] == []


def test_template_surrounds_turns_and_is_not_learned():
    template = Template(question=("a", "?"), answer=("b", "c"))
    batch = collate(sample(Turn(("c",)), Turn(("a",), answer=True)), template=template)
    assert batch["input_ids"].tolist() == [[A, C, Q, B, A, EOS, C]]
    assert batch["answer_index"].tolist() == [[-1, -1, -1, -1, 0, 0, -1]]


def test_over_long_sample_is_dropped_whole_counted_and_logged(caplog):
    collator = Collator(WORDS, patch_size=4, max_length=3)
    long = sample(Turn((image(),)), Turn(("a",), answer=True), name="row 7")
    short = sample(Turn(("a",), answer=True))
    with caplog.at_level(logging.WARNING):
        batch = collator([long, short, long])
    assert batch["dropped"] == 2
    assert collator.dropped == 2
    assert batch["input_ids"].tolist() == [[A, EOS]]
    assert len(batch["pixel_values"]) == 0
    assert "dropped sample row 7: 4 tokens, max_length is 3" in caplog.text


def test_batch_of_over_long_samples_is_empty():
    batch = collate(sample(Turn(("a b c",))), max_length=2)
    assert batch["input_ids"].shape == (0, 0)
    assert batch["dropped"] == 1


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([Turn((image(4, 6),))], "s: image sides must be positive multiples of patch_size=4"),
        ([Turn((image(4, 8), image(8, 8)))], "images of a batch must have one size"),
        ([Turn(("d",))], "known words, got 'd'"),
    ],
    ids=["sides", "sizes", "word"],
)
def test_collator_refuses(turns, message):
    with pytest.raises(ValueError, match=message):
        collate(sample(*turns))


def test_turn_refuses_what_is_no_piece():
    with pytest.raises(ValueError, match=r"must be a float tensor \(3, height, width\)"):
        Turn((torch.zeros(3, 4, 4, dtype=torch.uint8),))
    with pytest.raises(TypeError, match="content must be str or Tensor, got int"):
        Turn((3,))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="an answer must be text"):
        Turn((image(),), answer=True)


@pytest.mark.parametrize("name", ["patch_size", "max_length"])
def test_collator_refuses_sizes_below_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        collate(**{name: 0})


def test_words_survive_the_round_trip():
    tokenizer = DigitTokenizer()
    text = "which digit is in row 1 0 , column 7 ?"
    assert tokenizer.decode(tokenizer.encode("Which digit is in row 10, column 7?")) == text
    with pytest.raises(ValueError, match=r"ids must be in \[0, \d+\), got 999"):
        tokenizer.decode([999])


def hf_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "a": 1, "b": 2, "<unk>": 3, "<s>": 4}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", unk_token="<unk>")


def test_transformers_tokenizer_gets_an_image_token():
    tokenizer = HFTokenizer(hf_tokenizer())
    assert (tokenizer.image_id, tokenizer.size) == (5, 6)
    assert tokenizer.pad_id == tokenizer.eos_id == 0
    assert tokenizer.decode([*tokenizer.encode("a b"), 0, 5]) == "a b"


def test_text_that_spells_the_image_token_is_refused():
    collator = Collator(HFTokenizer(hf_tokenizer()), patch_size=4, max_length=9)
    with pytest.raises(ValueError, match="s: text must not contain the image token"):
        collator([sample(Turn(("a <image>",)))])


def test_chatml_ends_an_answer_with_its_end_token():
    assert CHATML.question == ("<|im_start|>user\n", "<|im_end|>\n")
    assert CHATML.answer == ("<|im_start|>assistant\n", "\n")
