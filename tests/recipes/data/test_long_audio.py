"""Clips joined to windows and conversations; the projector's alignment; starts from scorers."""

import pytest
import torch

from mm_sparse.recipes.data.long_audio import ConcatenatedClips
from mm_sparse.recipes.data.samples import RATE, ConcatSamples, Sample, Samples, Turn
from mm_sparse.recipes.data.splits import split_of
from mm_sparse.recipes.datasets import espeak_speech
from mm_sparse.recipes.models.ctc_alignment import alignment_loss

SECONDS = [1.0, 2.0, 3.0, 0.5, 9.0]


class Clips(Samples):
    """Clip `i` is as many samples of value `i` as its size says."""

    def __init__(self, first=0, sizes=SECONDS):
        self.first, self.sizes = first, sizes

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def __getitem__(self, index):
        name = self.first + index
        wave = torch.full((round(self.sizes[index] * RATE),), float(name))
        return Sample((Turn((wave, "write")), Turn((f"text{name}",), answer=True)), str(name))


def texts(sample):
    return [turn.content[0] for turn in sample.turns if turn.answer]


def test_every_clip_that_fits_comes_once_in_order():
    data = ConcatenatedClips(Clips(), seconds=4.0, pause=0.5)
    assert [texts(data[i]) for i in range(len(data))] == [["text0 text1"], ["text2 text3"]]
    (wave,) = data[0].audio
    assert len(wave) == round(data.size(0) * RATE) == 3.5 * RATE
    assert wave[:RATE].eq(0).all()
    assert wave[RATE : int(1.5 * RATE)].eq(0).all()
    assert wave[int(1.5 * RATE) :].eq(1).all()
    assert data[0].turns[0].content[1] == "write"


def test_random_windows_are_the_same_for_a_seed_and_fit():
    make = lambda seed: ConcatenatedClips(Clips(), seconds=6.0, shortest=1.0, length=40, seed=seed)  # noqa: E731
    data, again, other = make(0), make(0), make(1)
    found = [texts(data[i]) for i in range(40)]
    assert found == [texts(again[i]) for i in range(40)]
    assert found != [texts(other[i]) for i in range(40)]
    assert len({len(text[0].split()) for text in found}) > 1
    assert all(data.size(i) <= 6.0 for i in range(40))
    assert all("text4" not in text[0] for text in found)


def test_a_conversation_ends_with_a_window_of_the_samples_after_others():
    data = ConcatenatedClips(
        Clips(sizes=[1.0, 1.0]), seconds=2.5, windows=4, before=Clips(10, [1.0, 2.0])
    )
    assert len(data) == 1
    *first, last = texts(data[0])
    assert last == "text0 text1"
    assert len(first) == 3
    assert {text for window in first for text in window.split()} <= {"text10", "text11"}
    assert sum(len(audio) for audio in data[0].audio) == round(data.size(0) * RATE)
    assert [turn.answer for turn in data[0].turns] == [False, True] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"pause": -1.0}, "pause must be at least 0, got -1.0"),
        ({"shortest": 40.0}, r"shortest must be in \(0, seconds=28.0\], got 40.0"),
        ({"seconds": 0.1}, "samples must hold a sample of up to 0.1 s, got none"),
        ({"before": Clips(sizes=[None])}, "before must be of known size, sample 0 has none"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_windows_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConcatenatedClips(Clips(), **options)


def test_a_mixture_repeats_its_sets_and_knows_their_sizes():
    mixed = ConcatSamples([Clips(), Clips(10, [7.0])], times=[1, 3])
    assert [mixed.size(i) for i in range(len(mixed))] == [*SECONDS, 7.0, 7.0, 7.0]
    assert mixed[7].name == "10"
    with pytest.raises(ValueError, match=r"for each of 2 parts, got \[1\]"):
        ConcatSamples([Clips(), Clips()], times=[1])


def test_tokens_that_spell_the_answer_align_and_others_do_not():
    table = torch.eye(6)
    said = torch.tensor([3, 1, 4])
    spelled = table[[3, 0, 1, 4, 5, 5]]
    right = alignment_loss(spelled, [4, 2], [said, torch.tensor([5])], table, blank=0)
    wrong = alignment_loss(spelled.flip(0), [4, 2], [said, torch.tensor([5])], table, blank=0)
    assert right < 0.1 < 1 < wrong


def test_a_projector_learns_what_is_spelled():
    torch.manual_seed(0)
    table, frames = torch.randn(8, 16), torch.randn(10, 12)
    layer = torch.nn.Linear(12, 16)
    optimizer = torch.optim.Adam(layer.parameters(), 0.03)
    answers = [torch.tensor([2, 5]), torch.tensor([7, 1, 3])]
    losses = []
    for _ in range(60):
        loss = alignment_loss(layer(frames), [4, 6], answers, table, blank=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_alignment_wants_an_answer_for_each_audio():
    with pytest.raises(ValueError, match="one for each of 2 clips to be aligned, got 1"):
        alignment_loss(torch.eye(3), [1, 2], [torch.tensor([1])], torch.eye(3), blank=0)


def test_sentences_are_short_and_plain(tmp_path):
    entry = '0 03 n 01 | a gloss; "the cat sat down"; "too short"; "it cost $5 in all"; "a b c d"\n'
    (tmp_path / "data.noun").write_text(entry)
    assert list(espeak_speech.examples(tmp_path)) == ["the cat sat down", "a b c d"]


def test_no_text_of_a_held_out_split_is_spoken(tmp_path, monkeypatch):
    sentences = [f"sentence {'x' * n} goes here" for n in range(1, 60)]
    assert {split_of(text) for text in sentences} == {"train", "validation", "test"}
    (tmp_path / "data.noun").write_text("".join(f'0 n | g; "{text}"\n' for text in sentences))
    heard = []
    monkeypatch.setattr(espeak_speech, "speak", lambda texts, *rest: heard.extend(texts) or 0.0)
    espeak_speech.main([f"--wordnet={tmp_path}", f"--out={tmp_path}"])
    assert heard
    assert {split_of(text) for text in heard} == {"train"}
