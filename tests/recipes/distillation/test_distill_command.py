"""`mm-sparse distill`: folders of several kinds, runs that are cut off, wrong arguments."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mm_sparse as mms
from mm_sparse.cli.main import main as mm_sparse
from mm_sparse.recipes.distillation import distill_command, distill_report
from mm_sparse.recipes.distillation.distill_report import Reporter, mean, outlook
from mm_sparse.recipes.distillation.scorer_trainer import Length, Progress, ScorerTrainer, slope
from mm_sparse.recipes.finetuning import load_model
from tests.support.tiny_checkpoints import (
    write_checkpoint,
    write_language,
    write_pictures,
    write_texts,
    write_tones,
)

SMALL = ["--sinks", "0", "--window", "16", "--tiles", "6", "--validation", "1", "--draws", "1"]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_language(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = write_checkpoint(tmp_path_factory.mktemp("vl"), "qwen2_5_vl")
    return folder, write_pictures(tmp_path_factory.mktemp("pictures"), count=12, words=16)


def arguments(folder: str, data: str, out: Path, steps: int = 6, tokens: int = 384) -> list[str]:
    return [folder, "--data", data, "--tokens", str(tokens), "--steps", str(steps),
            "--out", str(out), "--ratio", "0.3", "--device", "cpu", *SMALL]  # fmt: skip


def scorers(model: Any) -> dict[str, torch.Tensor]:
    return mms.scorers_of(model).state_dict()


def test_a_language_model_gets_scorers_that_know_more(
    language: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    mm_sparse(["distill", *arguments(language, texts, out, steps=60), "--lr", "0.01"])
    said, progress = capsys.readouterr()
    card = json.loads((out / "scorers" / "card.json").read_text())
    first = next(line for line in progress.splitlines() if "measured at step 0" in line)
    before = float(first.split("overlap with the best units ")[1])
    assert card["overlap"] > before + 0.02
    assert card["training"]["steps"] == 60
    assert card["training"]["tokens"] == 60 * 384
    assert card["kl"] <= card["kl_with_one_ratio"]
    assert "This is an extrapolation" in card["extrapolation"]
    assert f'load: mms.load_scorers(model, "{out}/scorers")' in said
    assert "model.layers.1.self_attn" in said
    model = mms.load_scorers(load_model(language), out / "scorers")
    ratios = mms.sparse_config(model).layer_ratio
    flat = [x for own in ratios.values() for x in own]  # type: ignore[union-attr]
    assert sum(flat) / len(flat) == pytest.approx(0.3, abs=1e-4)
    assert any(value.any() for name, value in scorers(model).items() if name.endswith("key_map"))


@pytest.mark.parametrize("budgets", ["search", "none"])
def test_budgets_are_searched_or_left_alone(
    language: str, texts: str, tmp_path: Path, budgets: str
) -> None:
    out = tmp_path / "run"
    distill_command.main([*arguments(language, texts, out, 2), "--budgets", budgets])
    model = mms.load_scorers(load_model(language), out / "scorers")
    assert bool(mms.sparse_config(model).layer_ratio) == (budgets == "search")


def test_a_vision_language_model(pictures: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    distill_command.main(arguments(*pictures, out, steps=30))
    model = mms.load_scorers(load_model(pictures[0]), out / "scorers")
    maps = {name: x for name, x in scorers(model).items() if name.endswith("query_map")}
    # Of texts and images; the processor takes no audio.
    assert {len(x) for x in maps.values()} == {2}
    assert all(x.any() for name, x in maps.items() if "language_model" in name)
    card = json.loads((out / "scorers" / "card.json").read_text())
    assert "model.language_model.layers.0.self_attn" in card["layers"]
    assert card["data"]["about"] == "12 conversations"


def test_budgets_are_by_modality_where_a_layer_has_several(language: str) -> None:
    model = mms.sparsify(
        load_model(language).eval().requires_grad_(False),
        mms.SparseConfig(ratio=0.3, tile=64, sinks=0, window=16, bidirectional=(), dense_below=0),
    )
    torch.manual_seed(0)
    held = [{"input_ids": torch.randint(14, 300, (1, 384))}]
    trainer: Any = SimpleNamespace(model=model, moved=lambda batch: batch)
    given: Any = SimpleNamespace(budgets="first-order", budget_tokens=384, draws=1, seed=0)
    kinds = (torch.arange(384) < 192)[None].int() * int(mms.Modality.IMAGE)
    with mms.set_modality(model, kinds):
        mixed = distill_command.spread_budgets(given, trainer, held)
    alone = distill_command.spread_budgets(given, trainer, held)
    heads = {(layer, head) for layer in (0, 1) for head in (0, 1)}
    both = (mms.Modality.TEXT, mms.Modality.IMAGE)
    assert set(alone.ratios) == heads
    assert set(mixed.ratios) == {(*place, kind) for place in heads for kind in both}


def test_a_speech_language_model(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen2_audio")
    (tmp_path / "tones").mkdir()
    rows = Path(write_tones(tmp_path / "tones", 8)).read_text().splitlines()
    # A speech manifest asks in a word what is said; nothing could be left out of that.
    chats = [
        {"messages": [
            {"role": "user", "content": [
                {"type": "audio", "path": json.loads(row)["audio_filepath"]},
                {"type": "text", "text": "Is it high or low? " * 14},
            ]},
            {"role": "assistant", "content": "high"},
        ]}
        for row in rows
    ]  # fmt: skip
    data = tmp_path / "tones/chats.jsonl"
    data.write_text("\n".join(map(json.dumps, chats)))
    distill_command.main([*arguments(folder, str(data), tmp_path / "run", 2)])
    assert (tmp_path / "run/scorers/scorers.json").is_file()


def test_a_model_of_pictures_learns_from_texts(
    pictures: tuple[str, str], texts: str, tmp_path: Path
) -> None:
    distill_command.main([*arguments(pictures[0], texts, tmp_path / "run", 2), "--draws", "1"])
    assert (tmp_path / "run/scorers/scorers.json").is_file()


class CutOff:
    """Breaks a run off after some steps, as a user does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        whole = Reporter.step

        def stop(own: Reporter, loss: float) -> None:
            whole(own, loss)
            if own.trainer.progress.step == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(Reporter, "step", stop)


@pytest.mark.parametrize("kind", ["texts", "conversations"])
def test_a_run_goes_on_bit_for_bit(
    language: str, texts: str, pictures: tuple[str, str], tmp_path: Path, kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, data = (language, texts) if kind == "texts" else pictures
    more = ["--budgets", "none"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distill_command.main([*arguments(folder, data, whole, 14), *more])
    with monkeypatch.context() as patch:
        CutOff(patch, 5)
        with pytest.raises(SystemExit, match="stopped at step 5; the same command goes on"):
            distill_command.main([*arguments(folder, data, parts, 14), *more])
    distill_command.main([*arguments(folder, data, parts, 14), *more])
    a, b = (torch.load(x / "state.pt", weights_only=True)["run"] for x in (whole, parts))
    assert a["progress"]["losses"] == b["progress"]["losses"]
    assert a["progress"]["step"] == 14
    assert all(torch.equal(value, b["scorers"][name]) for name, value in a["scorers"].items())
    assert a["rows"] == b["rows"]
    files = [(x / "scorers/scorers.safetensors").read_bytes() for x in (whole, parts)]
    assert files[0] == files[1]


def test_a_signal_waits_for_the_end_of_a_step_and_a_second_does_not(
    language: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*arguments(language, texts, tmp_path / "run", 9), "--budgets", "none"]
    run = ScorerTrainer.run

    def killed(times: int, at: int) -> None:
        def run_and_kill(own: ScorerTrainer, batch: Any) -> Any:
            if own.inside_step and own.progress.step == at:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGTERM)
            return run(own, batch)

        monkeypatch.setattr(ScorerTrainer, "run", run_and_kill)

    killed(1, at=3)
    with pytest.raises(SystemExit, match="stopped at step 4; the same command goes on"):
        distill_command.main(given)
    state = (tmp_path / "run/state.pt").read_bytes()
    killed(2, at=5)
    with pytest.raises(SystemExit, match="stopped inside step 6, which is lost"):
        distill_command.main(given)
    assert (tmp_path / "run/state.pt").read_bytes() == state
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_by_time_ends_when_it_is_over(
    language: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(language, texts, tmp_path / "run")
    at = given.index("--steps")
    given[at : at + 2] = ["--hours", "0.0005"]
    distill_command.main([*given, "--budgets", "none"])
    seconds = torch.load(tmp_path / "run/state.pt", weights_only=True)["run"]["progress"]["seconds"]
    assert seconds >= 1.8
    assert "100 %" in capsys.readouterr().err


def test_a_yaml_file_holds_the_options(language: str, texts: str, tmp_path: Path) -> None:
    file = tmp_path / "distill.yaml"
    file.write_text(f"folder: {language}\ndata: {texts}\nsteps: 2\ntokens: 256\nbudgets: none\n")
    got = distill_command.parse(["--config", str(file), "--out", "x", "--tokens", "512"])
    assert (got.folder, got.data, got.steps, got.tokens) == (language, [texts], 2, 512)
    file.write_text("tokns: 12\n")
    with pytest.raises(SystemExit):
        distill_command.parse(["--config", str(file)])


def test_the_recipe_that_ships_is_run_by_name(language: str, texts: str, tmp_path: Path) -> None:
    # It is made for an hour.
    more = arguments(language, texts, tmp_path / "run", 1)
    mm_sparse(["recipes", "run", "distill/checkpoint", *more, "--budgets", "none"])
    assert (tmp_path / "run/scorers/card.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere"], "data must name files, folders or patterns of them, got 'nowhere'"),
        (
            ["--tokens", "32"],
            "must be long enough for layers to have units to choose from .* got 32 tokens",
        ),
        (["--tokens", "100000"], "data must hold more than 1 rows of 100000 tokens"),
        (["--dtype", "float99"], "dtype must be 'auto' or a dtype of torch, got 'float99'"),
        (["--load-in-4bit"], "load_in_4bit needs bitsandbytes"),
    ],
)
def test_what_does_not_fit_is_named(
    language: str, texts: str, tmp_path: Path, change: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "bitsandbytes" else find(name, *more),
    )
    with pytest.raises(SystemExit, match=message):
        distill_command.main([*arguments(language, texts, tmp_path / "run"), *change])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "FOLDER must be given"),
        (["x", "--data", "y", "--out", "z"], "steps or hours must be given, and not both"),
        (["x", "--data", "y", "--out", "z", "--steps", "0"], "steps must be at least 1, got 0"),
        (["x", "--data", "y", "--out", "z", "--hours", "-1"], "hours must be positive, got -1"),
        (["x", "--data", "y", "--out", "z", "--steps", "1", "--lr", "0"], "lr must be positive"),
        (["x", "--data", "y", "--out", "z", "--steps", "1", "--ratio", "0.01"],
         "ratio must be at least 0.06 for budgets over heads, got 0.01"),
        (["x", "--data", "y", "--out", "z", "--steps", "1", "--scorers-from", "a", "--unit", "16"],
         "--unit must not be given with --scorers-from"),
        (["--config", "nowhere.yaml"], "config must be a YAML file, got 'nowhere.yaml'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        distill_command.parse(given)
    assert message in capsys.readouterr().err


def test_a_run_of_other_settings_is_not_gone_on_with(
    language: str, texts: str, tmp_path: Path
) -> None:
    given = [*arguments(language, texts, tmp_path / "run", 1), "--budgets", "none"]
    distill_command.main(given)
    with pytest.raises(SystemExit, match=r"tokens must be 384 as in the run of .*, got 512"):
        distill_command.main([*given, "--tokens", "512"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    with pytest.raises(SystemExit, match="out must be new, empty or of a run"):
        distill_command.main(arguments(language, texts, tmp_path / "other"))


def test_scorers_go_on_from_a_folder(language: str, texts: str, tmp_path: Path) -> None:
    given = arguments(language, texts, tmp_path / "first", 2)
    distill_command.main(given)
    again = [language, "--data", texts, "--tokens", "384", "--steps", "2", "--device", "cpu",
             "--out", str(tmp_path / "again"), "--scorers-from", str(tmp_path / "first/scorers"),
             "--validation", "1", "--budgets", "none"]  # fmt: skip
    distill_command.main(again)
    configs = [json.loads((tmp_path / x / "scorers/scorers.json").read_text())["config"]
               for x in ("first", "again")]  # fmt: skip
    assert configs[0] == configs[1]
    assert configs[0]["layer_ratio"]


def test_the_slope_of_a_loss() -> None:
    import math

    losses = [1.0 - 0.1 * math.log(step) for step in range(1, 101)]
    assert slope(losses) == pytest.approx(0.1 * math.log(2))
    assert slope(losses[:6]) is None
    trainer: Any = type("Trainer", (), {"progress": Progress(100, 1, 60.0, losses)})()
    said = outlook(trainer)
    assert said is not None
    assert said.startswith(f"another 0:01:00 would bring about {0.1 * math.log(2):.5f} less")
    assert mean({}, "kept") == 0
    assert distill_report.first_lines(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


@pytest.mark.gpu
def test_a_gpu_holds_weights_of_16_bits(language: str, texts: str, tmp_path: Path) -> None:
    given = arguments(language, texts, tmp_path / "run", 20)
    given[given.index("cpu")] = "cuda"
    distill_command.main([*given, "--unit", "16"])
    card = json.loads((tmp_path / "run/scorers/card.json").read_text())
    assert card["model"].endswith("bfloat16")
    assert card["kl"] <= card["kl_with_one_ratio"]


def test_long_rows_and_dense_layers_are_told_of(
    language: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(language, texts, tmp_path / "run", 1, tokens=2304)
    distill_command.main([*given, "--budgets", "none", "--dense-layers", "0"])
    said, progress = capsys.readouterr()
    assert "2304 tokens are more than the 2048 that the model was made for" in progress
    assert "model.layers.1.self_attn" in said
    assert "model.layers.0.self_attn" not in said
    readme = (tmp_path / "run/scorers/README.md").read_text()
    assert f'mms.load_scorers(load_model("{language}"), "{tmp_path}/run/scorers")' in readme


def test_a_model_without_scorers_that_learn_is_refused(language: str) -> None:
    model: Any = mms.sparsify(load_model(language), mms.SparseConfig())
    with pytest.raises(ValueError, match="model must have scorers that learn, got none"):
        ScorerTrainer(model, None, Length(steps=1))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts", "conversations"])
def test_two_processes_learn_what_one_learns(
    language: str, texts: str, pictures: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    folder, data = (language, texts) if kind == "texts" else pictures
    # 511 tokens: no multiple of the number of processes, and more tiles than are drawn.
    given = arguments(folder, data, tmp_path / "one", 8, tokens=511)
    distill_command.main(given)
    given[given.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    root = Path(__file__).resolve().parents[3]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
         "-m", "mm_sparse.cli", "distill", *given],
        cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # One of the two reports and writes.
    assert done.stderr.count("measured at step 0") == 1
    assert done.stdout.count("load: ") == 1
    one, two = (
        torch.load(tmp_path / x / "state.pt", weights_only=True)["run"] for x in ("one", "two")
    )
    assert two["progress"]["losses"] == pytest.approx(one["progress"]["losses"], rel=1e-3)
    assert one["progress"]["losses"][0] == pytest.approx(two["progress"]["losses"][0], rel=1e-5)
    for name, value in one["scorers"].items():
        # AdamW makes a step of what rounding leaves of a gradient that is zero.
        assert (two["scorers"][name] - value).norm() <= 0.05 * value.norm() + 1e-3, name
    assert one["rows"] == two["rows"]
