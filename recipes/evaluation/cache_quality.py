"""What a cache that releases keys costs: against the whole cache, at equal size.

    python -m mm_sparse.recipes.evaluation.cache_quality --corpus corpus.npz --out cache.json

Two measures. KL in nats of the next tokens of a real text, whole cache against the one that has
released. Needle: a fact somewhere in the text is asked for, and counts if every token of the answer
is the likeliest one given those before; of the facts that the whole cache recalls. The question is
the end of the prompt, so that it is seen before keys are released; with `later` it comes after.

Methods keep equally many keys: `sparse` is `mms.SparseCache`, `spread` the same with
`mms.spread_keep`, `last` the first and the newest keys, `snapkv` as in SnapKV (arXiv 2404.14469):
attention mass of a window of queries, averaged over neighbours, one budget for all layers. Query
heads of a KV head share its keys, so their mass is averaged there, too.
N tokens of a prompt, V vocabulary
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from transformers import DynamicCache

import mm_sparse as mms
from mm_sparse.bench import machine
from mm_sparse.recipes.data import CorpusData, HFTokenizer, SmolLM2Tokenizer
from mm_sparse.recipes.evaluation.needle import Trial, trials
from mm_sparse.recipes.models import LanguageConfig

SINKS = 4
# Tokens that a cache is given at once after the prompt: too few to release anything.
PIECE = 16
# Of the code of SnapKV.
SNAPKV_WINDOW, SNAPKV_KERNEL = 32, 5
MakeCache = Callable[[], Any]


class LastCache(mms.SparseCache):
    """Keeps the first and the newest keys."""

    def worth(self, layer: Any, mass: Tensor, position: Tensor, kinds: Tensor) -> Tensor:
        return position.to(mass.dtype)


class SnapKVCache(mms.SparseCache):
    """Keeps the keys with the most mass, averaged over neighbours."""

    def worth(self, layer: Any, mass: Tensor, position: Tensor, kinds: Tensor) -> Tensor:
        return avg_pool1d(mass, SNAPKV_KERNEL, 1, SNAPKV_KERNEL // 2)


def methods(
    model: Any, names: Sequence[str], keep: float, prompts: Sequence[Tensor]
) -> dict[str, MakeCache]:
    """New caches by name of the method.

    Args:
        prompts: (1, N) each, from which `spread` measures; others than those that are judged.
    """
    makes: dict[str, MakeCache] = {
        "last": lambda: LastCache(model, keep, sinks=SINKS, window=2 * PIECE),
        "snapkv": lambda: SnapKVCache(model, keep, sinks=0, window=SNAPKV_WINDOW),
        "sparse": lambda: mms.SparseCache(model, keep, sinks=SINKS),
    }
    if "spread" in names:
        inputs = [{"input_ids": ids.to(model.device), "logits_to_keep": 1} for ids in prompts]
        shares = mms.spread_keep(model, inputs, keep, sinks=SINKS)
        makes["spread"] = lambda: mms.SparseCache(model, shares, sinks=SINKS)
    return {name: makes[name] for name in names}


@torch.no_grad()
def continued(model: Any, cache: Any, ids: Tensor, prompt: int) -> Tensor:
    """(tokens behind the prompt, V) logits at the prompt's last token and all but the last behind.

    Args:
        ids: (1, tokens), of which the first `prompt` are prefilled at once.
    """
    logits = [model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1).logits[0]]
    for at in range(prompt, ids.shape[1] - 1, PIECE):
        piece = ids[:, at : min(at + PIECE, ids.shape[1] - 1)]
        logits.append(model(piece, past_key_values=cache).logits[0])
    return torch.cat(logits).float()


def kl_of_next(
    model: Any, caches: dict[str, MakeCache], ids: Tensor, prompt: int
) -> dict[str, float]:
    """By method, KL(whole || released) of the tokens behind the prompt, the first left out.

    The prefill itself sees all keys, so that what follows from its last token is the same.
    """
    whole = continued(model, DynamicCache(), ids, prompt)[1:].log_softmax(-1)
    found = {}
    for name, make in caches.items():
        own = continued(model, make(), ids, prompt)[1:].log_softmax(-1)
        found[name] = (whole.exp() * (whole - own)).sum(-1).mean().item()
    return found


def recalls(model: Any, cache: Any, trial: Trial, later: bool) -> bool:
    """Whether every token of the answer is the likeliest one, given those before it."""
    ids = trial.ids.to(model.device)
    prompt = ids.shape[1] - trial.answer - (trial.asked if later else 0)
    logits = continued(model, cache, ids, prompt)[-trial.answer :]
    return bool((logits.argmax(-1) == ids[0, -trial.answer :]).all())


def needle(
    model: Any, caches: dict[str, MakeCache], facts: Iterator[Trial], count: int, later: bool
) -> tuple[dict[str, float], int]:
    """Share of the facts that the whole cache recalls, by method, and how many were tried.

    Args:
        count: facts that the whole cache recalls; at most five times as many are tried.
    """
    right: dict[str, list[bool]] = {name: [] for name in caches}
    tried = done = 0
    while done < count and tried < 5 * count:
        trial = next(facts)
        tried += 1
        if not recalls(model, DynamicCache(), trial, later):
            continue
        done += 1
        for name, make in caches.items():
            right[name].append(recalls(model, make(), trial, later))
    if not done:
        raise ValueError(f"model must recall a fact with its whole cache, got none of {tried}")
    return {name: sum(hits) / len(hits) for name, hits in right.items()}, tried


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help='"smollm2", a folder or a name')
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--corpus", required=True, help="file of recipes.data.text_corpus")
    parser.add_argument("--tokens", type=int, default=8192, help="of a prompt")
    parser.add_argument("--next", type=int, default=512, help="tokens behind it that KL is of")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.4, 0.25])
    names = ("last", "snapkv", "sparse", "spread")
    parser.add_argument("--methods", nargs="+", choices=names, default=list(names))
    parser.add_argument("--count", type=int, default=8, help="texts of each kind")
    parser.add_argument("--facts", type=int, default=100, help="that the whole cache recalls")
    parser.add_argument("--prompts", type=int, default=2, help="of each kind that spread measures")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = LanguageConfig(args.model, options={"dtype": args.dtype}).build(0)
    model.eval().requires_grad_(False).to(device)
    tokenizer: Any = SmolLM2Tokenizer() if args.model == "smollm2" else HFTokenizer(args.model)
    data = CorpusData(args.corpus, args.tokens + args.next)
    texts = {kind: rows[: args.count] for kind, rows in data.kinds("test").items()}
    short = next((rows for rows in texts.values() if rows.shape[1] < args.tokens + args.next), None)
    if short is not None:
        parser.error(
            f"argument --corpus: must have texts of {args.tokens} + {args.next} tokens, got "
            f"{short.shape[1]}: build it with --tokens {args.tokens + args.next}"
        )
    seen = data.kinds("validation").values()
    prompts = [row[None, : args.tokens] for rows in seen for row in rows[: args.prompts]]
    facts = torch.cat([rows[:, : args.tokens] for rows in texts.values()])
    record: dict[str, Any] = {
        "machine": machine(device, getattr(torch, args.dtype)), "model": args.model,
        "tokens": args.tokens, "next": args.next, "rows": [],
    }  # fmt: skip

    def note(row: dict[str, Any]) -> None:
        record["rows"].append(row)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    for keep in args.keeps:
        caches = methods(model, args.methods, keep, prompts)
        for kind, rows in texts.items():
            found = [kl_of_next(model, caches, row[None].to(device), args.tokens) for row in rows]
            for name in caches:
                kls = [round(x[name], 5) for x in found]
                mean = round(statistics.fmean(kls), 5)
                note({"keep": keep, "method": name, "text": kind, "kl": mean, "kls": kls})
        for later in (False, True):
            shares, tried = needle(model, caches, trials(facts, tokenizer), args.facts, later)
            for name, share in shares.items():
                asked = "later" if later else "in the prompt"
                note({
                    "keep": keep, "method": name, "needle": asked, "recalled": round(share, 4),
                    "facts": args.facts, "tried": tried,
                })  # fmt: skip


if __name__ == "__main__":
    main()
