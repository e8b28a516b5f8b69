"""A fact placed in thousands of tokens of real text and asked for at the end: who still finds it?

    python -m mm_sparse.recipes.evaluation.needle --scorers FOLDER --corpus corpus.npz \\
        --out needle.json

Only facts that the dense model recalls count: the share of those that each method recalls too.
N tokens of a sequence
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mm_sparse as mms
from mm_sparse.integrations import override_config, override_scorers
from mm_sparse.recipes.metrics import METHODS, budgets_of
from mm_sparse.recipes.run import add_options, changes_of, prepared

PLACES = (
    "Lyon", "Oslo", "Turin", "Quito", "Perth", "Kyoto", "Minsk", "Dakar", "Lima", "Bergen",
    "Porto", "Cairo", "Delhi", "Seoul", "Havana", "Dublin", "Athens", "Prague", "Tunis", "Hanoi",
)  # fmt: skip
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Trial:
    """One question."""

    depth: float
    """Where the fact stands, from 0 (front) to 1."""
    ids: Tensor
    """(1, N), the answer last."""
    answer: int
    """Tokens of the answer."""
    asked: int
    """Tokens of the question, before it."""


def trials(
    rows: Tensor, tokenizer: Any, *, depths: Sequence[float] = DEPTHS, seed: int = 0
) -> Iterator[Trial]:
    """Facts in texts without end: every row in turn, every depth in turn.

    Args:
        rows: (count, N) ids of real text.
        tokenizer: `encode` of text to ids.
    """
    if rows.dim() != 2 or not rows.numel():
        raise ValueError(f"rows must be (count, tokens) with some of both, got {tuple(rows.shape)}")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must be one or more in [0, 1], got {tuple(depths)}")
    chance, turn = random.Random(seed), 0
    while True:
        depth, row = depths[turn % len(depths)], rows[turn // len(depths) % len(rows)].tolist()
        place, number = chance.choice(PLACES), str(chance.randrange(10_000, 100_000))
        fact = tokenizer.encode(f"\nThe secret number of {place} is {number}.\n")
        asked = tokenizer.encode(
            f"\nQuestion: What is the secret number of {place}?\nAnswer: The secret number of "
            f"{place} is"
        )
        answer = tokenizer.encode(f" {number}")
        space = len(row) - len(fact) - len(asked) - len(answer)
        if space < 1:
            raise ValueError(f"rows must be longer than a question and its fact, got {len(row)}")
        at = round(depth * space)
        ids = [*row[:at], *fact, *row[at:space], *asked, *answer]
        yield Trial(depth, torch.tensor([ids]), len(answer), len(asked))
        turn += 1


@torch.no_grad()
def recalls(model: Any, trial: Trial, device: torch.device) -> bool:
    """Whether every token of the answer is the likeliest one, given those before it."""
    ids = trial.ids.to(device)
    logits = model(ids, use_cache=False, logits_to_keep=trial.answer + 1).logits
    return bool((logits[0, :-1].argmax(-1) == ids[0, -trial.answer :]).all())


def recall(
    model: nn.Module,
    trials: Iterator[Trial],
    settings: dict[str, tuple[str, dict[str, Any]]],
    *,
    count: int = 200,
    most: int = 1000,
    every: int = 20,
) -> Iterator[list[dict[str, Any]]]:
    """Share of the facts that dense recalls, by setting and depth, as it stands by and by.

    Args:
        model: sparsified.
        settings: by name a method of `quality.METHODS`, and fields of the config that change.
        count: facts that dense recalls, after which it stops.
        most: facts after which it stops in any case.
        every: facts that dense recalls between two results.
    """
    device = next(model.parameters()).device
    answered: list[Trial] = []
    right: dict[str, list[bool]] = {name: [] for name in settings}
    tried = 0
    while len(answered) < count and tried < most:
        trial = next(trials)
        tried += 1
        with override_config(model, backend="dense"):
            if not recalls(model, trial, device):
                continue
        answered.append(trial)
        for name, (method, changes) in settings.items():
            with override_config(model, **changes), override_scorers(model, METHODS[method]):
                right[name].append(recalls(model, trial, device))
        if len(answered) % every == 0:
            yield _rows(answered, right, tried)
    if not answered:
        raise ValueError(f"model must recall a fact when it is dense, got none of {tried}")
    if len(answered) % every:
        yield _rows(answered, right, tried)


def _rows(answered: list[Trial], right: dict[str, list[bool]], tried: int) -> list[dict[str, Any]]:
    depths = sorted({trial.depth for trial in answered})
    return [
        {
            "setting": name, "trials": len(answered), "tried": tried,
            "recalled": round(sum(hits) / len(hits), 4),
            "by_depth": {
                depth: round(sum(own) / len(own), 4)
                for depth in depths
                if (own := [h for h, t in zip(hits, answered, strict=True) if t.depth == depth])
            },
        }
        for name, hits in right.items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    from mm_sparse.recipes.data import CorpusData, HFTokenizer, SmolLM2Tokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--count", type=int, default=200, help="facts that dense recalls")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2])
    args = parser.parse_args(argv)
    model, record = prepared(args)
    smollm2 = args.model == "smollm2"
    tokenizer: Any = SmolLM2Tokenizer() if smollm2 else HFTokenizer(args.model)
    texts = torch.cat(list(CorpusData(args.corpus, args.tokens).kinds("test").values()))
    settings: dict[str, tuple[str, dict[str, Any]]] = {}
    for method in args.methods:
        for ratio in args.ratios:
            own = budgets_of(mms.sparse_config(model), method, ratio)
            settings[f"{method} {ratio}"] = method, {"dense_below": 0} | own | changes_of(args)
    for rows in recall(model, trials(texts, tokenizer), settings, count=args.count):
        record["rows"] = rows
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
