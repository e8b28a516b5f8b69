"""Facts in long texts: where they stand, what is asked, and who counts as having found them."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import mm_sparse as mms
from mm_sparse.integrations.context import override_config
from mm_sparse.integrations.state import sparse_config
from mm_sparse.recipes.evaluation import needle
from mm_sparse.recipes.models.language import LanguageConfig
from tests.support.tiny_recipes import SPARSE, TINY


class Characters:
    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


ROWS = torch.full((3, 400), ord("."))


def text_of(trial: needle.Trial) -> str:
    return "".join(map(chr, trial.ids[0].tolist()))


def test_a_trial_holds_its_fact_at_its_depth_and_asks_for_it_last() -> None:
    for trial in itertools.islice(needle.trials(ROWS, Characters(), depths=(0.0, 0.5, 1.0)), 6):
        text = text_of(trial)
        assert trial.ids.shape == (1, 400)
        number = text[-trial.answer :].strip()
        fact = f" is {number}.\n"
        assert text.count(number) == 2
        place = text.split("secret number of ")[1].split()[0]
        assert text.endswith(f"Answer: The secret number of {place} is {number}")
        start = text.index("\nThe secret number of")
        asked = text.index("\nQuestion")
        length = text.index(fact) + len(fact) - start
        assert start == round(trial.depth * (asked - length))


def test_trials_are_the_same_every_time_and_differ_among_each_other() -> None:
    first, again = (
        [text_of(t) for t in itertools.islice(needle.trials(ROWS, Characters()), 8)]
        for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == 8


class Echo(nn.Module):
    """Recalls a fact if the depth that it is asked at, by a mark, is one it was told to know."""

    def __init__(self, known: dict[str, tuple[float, ...]]) -> None:
        super().__init__()
        self.known, self.mode, self.depth = known, "dense", 0.0
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        logits = torch.zeros(1, logits_to_keep, 128)
        if self.depth in self.known[self.mode]:
            following = ids[0, -logits_to_keep + 1 :]
            logits[0, torch.arange(logits_to_keep - 1), following] = 1.0
        return type("Out", (), {"logits": logits})


def test_only_what_dense_recalls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    model = Echo({"dense": (0.1, 0.5), "good": (0.1, 0.5, 0.9), "bad": (0.5,)})

    @contextmanager
    def override_config(model: Echo, **changes: Any):
        model.mode = changes.get("backend") or changes["mode"]
        yield

    @contextmanager
    def override_scorers(model: Echo, make: Any):
        yield

    def marked():
        for trial in needle.trials(ROWS, Characters(), depths=(0.1, 0.5, 0.9)):
            model.depth = trial.depth
            yield trial

    monkeypatch.setattr(needle, "override_config", override_config)
    monkeypatch.setattr(needle, "override_scorers", override_scorers)
    settings = {"good": ("window", {"mode": "good"}), "bad": ("window", {"mode": "bad"})}
    *_, (good, bad) = needle.recall(model, marked(), settings, count=6)
    assert (good["trials"], good["tried"]) == (6, 8)
    assert good["recalled"] == 1.0
    assert bad["recalled"] == 0.5
    assert bad["by_depth"] == {0.1: 0.0, 0.5: 1.0}
    model.known["dense"] = ()
    with pytest.raises(ValueError, match="model must recall a fact when it is dense, got none of"):
        list(needle.recall(model, marked(), settings, most=4))


def test_a_real_model_at_a_whole_ratio_recalls_what_it_recalls_dense() -> None:
    torch.manual_seed(0)
    model = LanguageConfig(options=TINY | {"vocab_size": 128}).build(0).eval()
    mms.sparsify(model, SPARSE)
    trial = next(needle.trials(ROWS, Characters()))
    # Whatever this model says is made the answer, so that dense recalls it.
    for _ in range(trial.answer):
        with torch.no_grad(), override_config(model, backend="dense"):
            ahead = model(trial.ids, use_cache=False).logits[0, -trial.answer - 1 : -1].argmax(-1)
        trial.ids[0, -trial.answer :] = ahead
    settings = {"whole": ("pooled", {"ratio": 1.0})}
    ((row,),) = needle.recall(model, iter([trial]), settings, count=1)
    assert row["recalled"] == 1.0
    assert sparse_config(model) == SPARSE


@pytest.mark.parametrize(
    ("rows", "depths", "message"),
    [
        (ROWS[0], (0.5,), r"rows must be \(count, tokens\)"),
        (ROWS[:, :50], (0.5,), "rows must be longer than a question and its fact, got 50"),
        (ROWS, (1.5,), r"depths must be one or more in \[0, 1\]"),
        (ROWS, (), r"depths must be one or more in \[0, 1\]"),
    ],
)
def test_impossible_trials_are_refused(rows, depths, message) -> None:
    with pytest.raises(ValueError, match=message):
        next(needle.trials(rows, Characters(), depths=depths))
