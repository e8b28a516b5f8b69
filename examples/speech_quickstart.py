"""Train a small speech-language model with sparse attention and with dense, and compare.

    python examples/speech_quickstart.py      # 2 CPU cores, no GPU, no account; mm-sparse[all]

Both runs read recipes/configs/speech/digits.yaml: same data, seed and steps. The speech is
synthetic: 20 digits by espeak-ng, or tones where it is not installed. Both start from one tower
that learns first to tell digits apart (recipes/run/pretrain_audio_tower.py); projector and
language model start untrained.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mm_sparse.analysis import write_page
from mm_sparse.recipes.datasets import SpokenWords
from mm_sparse.recipes.run import RUNS, inspection_sample, prepare, pretrain_audio_tower

CONFIG = str(
    Path(__file__).resolve().parent.parent / "recipes" / "configs" / "speech" / "digits.yaml"
)


def held_out(cli: Any, length: int) -> dict[str, float]:
    """Error rates of generated answers on dictations whose texts no training step has seen."""
    cli.datamodule.test = SpokenWords(
        "test",
        length,
        words=cli.datamodule.train.words,
        question=cli.datamodule.train.question,
    )
    (scores,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    return {name.removeprefix("test/"): value for name, value in scores.items()}


def main() -> None:
    """Both runs, one table, one page, one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--out", type=Path, default=Path("runs/spoken"))
    parser.add_argument("--clips", type=int, default=64, help="held-out dictations to score")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--only", choices=RUNS, help="one run instead of both")
    options = parser.parse_args()
    # LightningCLI warns of a command line beside the arguments that it is given.
    sys.argv = sys.argv[:1]
    more = [] if options.steps is None else [f"--trainer.max_steps={options.steps}"]
    start = time.perf_counter()
    pretrain_audio_tower.main(["--config", CONFIG])
    rows: dict[str, dict[str, float]] = {}
    speaker = ""
    for name in [options.only] if options.only else RUNS:
        cli = prepare(name, CONFIG, more)
        speaker = cli.datamodule.train.speaker
        before = held_out(cli, options.clips)
        print(f"training with {name} attention", flush=True)
        begun = time.perf_counter()
        cli.trainer.fit(cli.model, cli.datamodule)
        seconds = time.perf_counter() - begun
        rows[name] = {
            **{f"{rate} before": before[rate] for rate in ("wer", "cer")},
            **held_out(cli, options.clips),
            "seconds": seconds,
        }
        if name == "sparse":
            shown = inspection_sample(
                cli.model.eval(), cli.datamodule.collator, cli.datamodule.test[0]
            )
            print(f"what a sample kept: {write_page(shown, options.out / 'kept.html')}")
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    width = max(len(key) for key in keys) + 2
    print(f"\nsynthetic speech: {speaker}\n{'':{width}}" + "".join(f"{n:>10}" for n in rows))
    for key in keys:
        cells = [rows[name].get(key) for name in rows]
        print(f"{key:{width}}" + "".join(f"{'' if c is None else f'{c:.3f}':>10}" for c in cells))
    record = {
        "seconds": time.perf_counter() - start,
        "speaker": speaker,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
