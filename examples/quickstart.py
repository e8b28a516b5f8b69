"""Finetune the digits model with sparse attention and with dense, and compare.

    bash examples/quickstart.sh             # 2 CPU cores, no GPU, no account
    python examples/quickstart.py           # the same in an environment that has mm-sparse[all]

Both runs read recipes/configs/vlm/digits.yaml: same data, seed and steps. They start from one
tower, which learns first to tell digits apart (recipes/run/pretrain_vision_tower.py); projector
and language model start untrained.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from mm_sparse.analysis import kept_patches
from mm_sparse.integrations import capture_attention
from mm_sparse.modality import Modality
from mm_sparse.recipes.datasets import DigitCanvases
from mm_sparse.recipes.metrics import densities
from mm_sparse.recipes.run import RUNS, prepare, pretrain_vision_tower

CONFIG = str(Path(__file__).resolve().parent.parent / "recipes" / "configs" / "vlm" / "digits.yaml")


def finetune(name: str, options: list[str]) -> tuple[Any, float]:
    """The recipe's trainer, model and data after the last step, and the seconds it took."""
    print(f"finetuning with {name} attention", flush=True)
    start = time.perf_counter()
    cli = prepare(name, CONFIG, options)
    cli.trainer.fit(cli.model, cli.datamodule)
    return cli, time.perf_counter() - start


def held_out(cli: Any, length: int) -> dict[str, float]:
    """Exact match on canvases of the test split: handwriting that no training step has seen."""
    settings = cli.datamodule.train
    data = DigitCanvases(
        "test",
        length,
        rows=settings.rows,
        columns=settings.columns,
        cell=settings.cell,
        scale=settings.scale,
        questions=settings.questions,
    )
    model = cli.model.eval()
    right, by_name = [], {}
    with torch.no_grad():
        for batch in cli.datamodule.loader(data):
            right.append(model(batch).exact)
            for name, value in densities(model).items():
                by_name.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in by_name.items()}
    return {"exact_match": torch.cat(right).float().mean().item(), **means}


def draw(cli: Any, path: Path) -> str:
    """Draw which patches the tokens of a held-out question kept; returns the question."""
    model, data = cli.model.eval(), cli.datamodule
    settings = data.train
    canvas = DigitCanvases(
        "test", 1, rows=settings.rows, columns=settings.columns, cell=settings.cell,
        scale=settings.scale, questions=1,
    )[0]  # fmt: skip
    batch = data.collator([canvas])
    selections = {}

    def keep(call: Any) -> None:
        if call.selection is not None:
            selections[call.name.removeprefix("model.").removesuffix(".self_attn")] = call.selection

    with torch.no_grad(), capture_attention(model.language, keep):
        model(batch)
    text = (batch["input_ids"][0] != model.image_id) & (batch["labels"][0] < 0)
    question = str(canvas.turns[0].content[-1])
    kept_patches(
        selections,
        text.nonzero().flatten().tolist(),
        canvas.images[0],
        batch["image_grids"][0],
        path,
        title=f"{question} {canvas.turns[1].content[0]}",
    )
    return question


def main() -> None:
    """Both runs, one table, one image, one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--canvases", type=int, default=512, help="held-out canvases to score")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    options = parser.parse_args()
    more = [] if options.steps is None else [f"--trainer.max_steps={options.steps}"]
    start = time.perf_counter()
    pretrain_vision_tower.main(["--config", CONFIG])
    rows = {}
    for name in RUNS:
        cli, seconds = finetune(name, more)
        rows[name] = {"seconds": seconds, **held_out(cli, options.canvases)}
        if name == "sparse":
            question = draw(cli, options.out / "kept_patches.png")
    pairs = [f"{a.name}>{b.name}" for a in Modality for b in Modality]
    shown = ["exact_match", "seconds", "all", *(p for p in pairs if p in rows["sparse"])]
    labels = {"exact_match": "exact match, held out", "seconds": "finetuning, seconds"}
    print(f"\n{'':32}{'sparse':>10}{'dense':>10}")
    for key in shown:
        label = labels.get(key, f"density {key}")
        cells = [rows[name].get(key, 1.0) for name in ("sparse", "dense")]
        form = "{:10.0f}" if key == "seconds" else "{:10.1%}"
        print(f"{label:32}" + "".join(form.format(cell) for cell in cells))
    print("density: kept over visible query-key pairs, query first, layers with full attention")
    total = time.perf_counter() - start
    print(f'{total:.0f} s in all, {torch.get_num_threads()} threads; "{question}" kept: ', end="")
    print(options.out / "kept_patches.png")
    record = {"seconds": total, "threads": torch.get_num_threads(), "torch": torch.__version__}
    (options.out / "result.json").write_text(json.dumps({**record, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
