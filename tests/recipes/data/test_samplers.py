"""Packing, buckets, resumed loaders and dictations of the speech recipe."""

import numpy as np
import pytest
import torch

from mm_sparse.recipes.data.collate import Collator
from mm_sparse.recipes.data.datamodule import SampleData
from mm_sparse.recipes.data.samplers import LengthBuckets
from mm_sparse.recipes.data.samples import Sample, Samples, Turn
from mm_sparse.recipes.data.splits import SPLITS, split_of
from mm_sparse.recipes.datasets.digit_dictation import LONGEST, DictationTokenizer, SpokenWords


def dictation(words, samples):
    return Sample((Turn((torch.zeros(samples), "transcribe")), Turn((words,), answer=True)), words)


def collator(**options):
    return Collator(DictationTokenizer(), **{"max_length": 64, "samples_per_token": 320, **options})


def test_a_token_stands_for_each_stretch_of_audio_begun():
    batch = collator()([dictation("one", 3200), dictation("one two", 3201)])
    audio = (batch["input_ids"] == DictationTokenizer().audio_id).sum(1)
    assert audio.tolist() == [10, 11]
    assert batch["audio_lengths"].tolist() == [3200, 3201]
    assert batch["waveforms"].shape == (2, 11 * 320)
    assert batch["answers"] == ["one", "one two"]


def test_packing_fills_rows_and_restarts_positions():
    words = [dictation("one", 320 * n) for n in (30, 4, 20, 24)]
    batch = collator(pack=True)(words)
    alone = collator()(words)
    assert len(batch["input_ids"]) == 2
    assert batch["attention_mask"].sum() == alone["attention_mask"].sum()
    starts = (batch["position_ids"] == 0).sum(1).tolist()
    assert sum(starts) == 4
    assert sorted(batch["answer_index"].unique().tolist()) == [-1, 0, 1, 2, 3]
    # Clips stand in the order of the rows.
    tokens = [int(n) // 320 for n in batch["audio_lengths"]]
    assert tokens == [30, 24, 20, 4]


def test_audio_without_samples_per_token_is_refused():
    with pytest.raises(ValueError, match="one: samples_per_token must be given for an audio clip"):
        collator(samples_per_token=None)([dictation("one", 320)])


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(0), r"an audio clip must be a float tensor \(samples,\) of at least one"),
        (
            torch.zeros(5, dtype=torch.int16),
            r"an audio clip must be a float tensor .* got torch.int16",
        ),
    ],
)
def test_what_is_no_audio_is_refused(audio, message):
    with pytest.raises(ValueError, match=message):
        Turn((audio,))
    with pytest.raises(ValueError, match="an answer must be text, got audio in it"):
        Turn((torch.zeros(5),), answer=True)


class Lengths(Samples):
    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return dictation("one", 320 * self.sizes[index])

    def size(self, index):
        return self.sizes[index]


def test_buckets_hold_every_sample_once_and_batches_of_like_length():
    sizes = torch.randperm(64).add(1).tolist()
    order = list(LengthBuckets(Lengths(sizes), 8, 4))
    assert sorted(order) == list(range(64))
    spreads = [
        max(sizes[i] for i in order[at : at + 4]) - min(sizes[i] for i in order[at : at + 4])
        for at in range(0, 64, 4)
    ]
    assert max(spreads) < 8
    assert order != list(LengthBuckets(Lengths(sizes), 8, 4))


@pytest.mark.parametrize("options", [{}, {"buckets": 2}, {"workers": 1}], ids=str)
def test_a_loader_goes_on_where_its_state_says(options):
    def loader():
        torch.manual_seed(3)
        data = SampleData(
            Lengths(range(1, 13)),
            DictationTokenizer(),
            samples_per_token=320,
            batch_size=2,
            **options,
        )
        return data.train_dataloader()

    def lengths(batches):
        return [batch["audio_lengths"].tolist() for batch in batches]

    whole = loader()
    epochs = [lengths(whole), lengths(whole)]
    broken = loader()
    first = iter(broken)
    taken = [next(first) for _ in range(2)]
    assert lengths(taken) == epochs[0][:2]
    again = loader()
    again.load_state_dict(broken.state_dict())
    assert lengths(again) == epochs[0][2:]
    assert again.state_dict()["taken"] == 0
    assert lengths(again) == epochs[1]
    assert epochs[0] != epochs[1]


def test_unknown_lengths_cannot_be_bucketed():
    data = SampleData(Lengths([None, 2]), DictationTokenizer(), samples_per_token=320, buckets=2)
    with pytest.raises(ValueError, match=r"buckets must be 1 .* sample 0 of Lengths has none"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="buckets must be 1 without shuffle, got 2"):
        SampleData(Lengths([1]), DictationTokenizer(), buckets=2, shuffle=False)


def test_dictations_are_the_same_for_the_same_seed_and_apart_by_text():
    splits = {s: SpokenWords(s, 20, speaker="tones") for s in SPLITS}
    for split, data in splits.items():
        texts = [data[i].turns[1].content[0] for i in range(20)]
        assert {split_of(text) for text in texts} == {split}
    train = splits["train"]
    again = SpokenWords("train", 20, speaker="tones")
    assert torch.equal(train[3].audio[0], again[3].audio[0])
    assert not torch.equal(train[3].audio[0], SpokenWords(speaker="tones", seed=1)[3].audio[0])


def test_words_stand_where_the_dictation_says():
    numbers, wave, places = SpokenWords("train", 1, speaker="tones", noise=0.0).dictation(0)
    heard = np.zeros(len(wave), bool)
    for start, end in places:
        assert np.abs(wave[start:end]).max() > 0.1
        heard[start:end] = True
    assert not wave[~heard].any()
    assert len(numbers) == len(places) == 20


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"split": "dev"}, "split must be one of .*, got 'dev'"),
        ({"words": 0}, r"words must be in \[1, 64\], got 0"),
        ({"cell": 0.1}, r"cell must hold a word of 0\.\d+ s, got 0.1"),
        ({"speaker": "me"}, "speaker must be auto, espeak or tones, got 'me'"),
    ],
)
def test_dictations_refuse(options, wanted):
    with pytest.raises(ValueError, match=wanted):
        SpokenWords(**{"speaker": "tones", **options})


def test_numbers_stand_before_words_and_are_not_read_out():
    tokenizer = DictationTokenizer()
    ids = tokenizer.encode("nine one")
    assert [i - tokenizer.first_number for i in ids[::2]] == [0, 1]
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "nine one"
    assert tokenizer.audio_id == tokenizer.size == tokenizer.first_number + LONGEST
