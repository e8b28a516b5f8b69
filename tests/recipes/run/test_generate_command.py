"""`mm-sparse generate`: what is printed is what `model.generate` says, and the table is right."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import mm_sparse as mms
from mm_sparse.cli.main import main as command_line
from mm_sparse.recipes.data import Turn, read_audio, read_tensor
from mm_sparse.recipes.finetuning import encode, message_of
from mm_sparse.recipes.run import generate_command
from tests.support.hf_models import TEXT
from tests.support.tiny_checkpoints import tokenizer, write_checkpoint, write_pictures, write_tones

SPARSE = mms.SparseConfig(
    ratio=0.3, tile=64, unit=16, sinks=0, window=16, dense_below=0, bidirectional=()
)
LONG = "red green blue and a question about it. " * 20
QUESTION = "Which color is it?"
SHORT = ["--max-new-tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of three models, and of scorers of each beside them."""
    home = tmp_path_factory.mktemp("models")
    made = {kind: write_checkpoint(home / kind, kind) for kind in ("qwen2_5_vl", "qwen2_audio")}
    words = tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{
        **TEXT, "vocab_size": len(words), "max_position_embeddings": 2048, "bos_token_id": None,
        "eos_token_id": words.eos_token_id, "pad_token_id": None, "initializer_range": 0.1,
    }))  # fmt: skip
    # What folders of chat models hold, and greedy decoding warns of.
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
    model.save_pretrained(home / "text")
    words.save_pretrained(home / "text")
    made["text"] = str(home / "text")
    for kind, cls in (
        ("qwen2_5_vl", AutoModelForImageTextToText),
        ("qwen2_audio", AutoModelForMultimodalLM),
        ("text", AutoModelForCausalLM),
    ):
        plain: Any = cls.from_pretrained(made[kind])
        mms.sparsify(plain, SPARSE, scorer="relevance")
        mms.save_scorers(plain, home / f"{kind}-scorers")
    model.config.save_pretrained(home / "bare")
    write_pictures(home)
    write_tones(home)
    (home / "long.txt").write_text(LONG)
    return {**made, "home": str(home)}


def write_voxtral(home: Path) -> None:
    """Its folder, and that of its scorers; skips the test where its processor cannot be made."""
    folder = write_checkpoint(home / "voxtral", "voxtral")
    plain: Any = AutoModelForMultimodalLM.from_pretrained(folder)
    mms.sparsify(plain, SPARSE, scorer="relevance")
    mms.save_scorers(plain, home / "voxtral-scorers")


def stock(folder: str, cls: Any, inputs: Any, scorers: str | None = None) -> str:
    """What `model.generate` says."""
    model = cls.from_pretrained(folder).eval()
    if scorers is not None:
        mms.load_scorers(model, scorers)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    words = AutoTokenizer.from_pretrained(folder)
    return words.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, dict[str, str]]:
    """The answer and the table of a command line."""
    capsys.readouterr()
    assert command_line(["generate", *argv]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line[:14].strip() in FIELDS]
    return out.removesuffix("\n"), {line[:14].strip(): line[14:] for line in lines}


FIELDS = ("prompt", "first token", "decoding", "peak memory", "density", "sparse layers")


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_text_model_says_what_generate_says(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], dense: bool, static: bool
) -> None:
    folder, scorers = folders["text"], f"{folders['home']}/text-scorers"
    words = AutoTokenizer.from_pretrained(folder)
    inputs = words(f"{LONG}\n\n{QUESTION}", return_tensors="pt")
    wanted = stock(
        folder,
        AutoModelForCausalLM,
        {name: inputs[name] for name in ("input_ids", "attention_mask")},
        None if dense else scorers,
    )
    options = ["--dense"] if dense else ["--scorers", scorers]
    options += ["--static"] if static else []
    said, table = run(
        capsys, folder, "--file", f"{folders['home']}/long.txt", *options, *SHORT, QUESTION
    )
    assert said == wanted
    assert set(table) == set(FIELDS)
    count = inputs["input_ids"].numel()
    assert table["prompt"] == f"{count:,} tokens: {count:,} text"
    assert "tokens/s" in table["decoding"]
    assert table["peak memory"].endswith("GiB (RSS)")
    if dense:
        assert (table["density"], table["sparse layers"]) == ("1.000", "none, --dense")
    else:
        assert 0.2 < float(table["density"]) < 0.5
        assert table["sparse layers"] == "2 of 2"


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_audio", "voxtral"])
def test_a_multimodal_model_says_what_generate_says(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], kind: str, dense: bool
) -> None:
    home = folders["home"]
    if kind == "voxtral":
        write_voxtral(Path(home))
    folder = f"{home}/{kind}"
    if kind == "qwen2_5_vl":
        cls, files = AutoModelForImageTextToText, ["--image", f"{home}/0.png", f"{home}/1.png"]
        media = [read_tensor(path) for path in files[1:]]
    else:
        cls, files = AutoModelForMultimodalLM, ["--audio", f"{home}/0.wav"]
        media = [read_audio(files[1])]
    scorers = f"{home}/{kind}-scorers"
    message = message_of(Turn((*media, f"{LONG}\n\n{QUESTION}")))
    processor = AutoProcessor.from_pretrained(folder)
    wanted = {"padding": True, "return_tensors": "pt"}
    inputs = encode(processor, [[message]], wanted, add_generation_prompt=True)
    options = ["--dense"] if dense else ["--scorers", scorers]
    said, table = run(
        capsys, folder, *options, *SHORT, "--file", f"{home}/long.txt", *files, QUESTION
    )
    assert said == stock(folder, cls, inputs, None if dense else scorers)
    counts = dict(part.split()[::-1] for part in table["prompt"].split(": ")[1].split(", "))
    assert set(counts) == {"text", "image" if kind == "qwen2_5_vl" else "audio"}
    assert sum(map(int, counts.values())) == inputs["input_ids"].numel()
    if not dense:
        assert float(table["density"]) < 1
        assert table["sparse layers"].startswith(("4 of 4", "2 of 4"))


def test_a_video_is_read_and_short_prompts_run_dense(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [f"{folders['home']}/0.png"] * 4
    said, table = run(capsys, folders["qwen2_5_vl"], *SHORT, "--video", *frames, QUESTION)
    assert " video" in table["prompt"]
    assert table["density"] == "1.000"
    assert table["sparse layers"].startswith("0 of 4; ")
    assert "dense_below" in table["sparse layers"]
    dense, _ = run(capsys, folders["qwen2_5_vl"], "--dense", *SHORT, "--video", *frames, QUESTION)
    assert said == dense


def test_without_a_chat_template_the_question_is_used_as_it_is(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "plain", "qwen2_5_vl")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    _, table = run(capsys, folder, *SHORT, "--image", f"{folders['home']}/0.png", QUESTION)
    words = AutoTokenizer.from_pretrained(folder)
    assert f" {len(words(QUESTION)['input_ids'])} text" in table["prompt"]
    assert " image" in table["prompt"]


def test_a_ratio_of_ones_own_scales_the_scorers(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [folders["text"], "--file", f"{folders['home']}/long.txt", *SHORT, QUESTION]
    scorers = ["--scorers", f"{folders['home']}/text-scorers"]
    _, few = run(capsys, *given, *scorers, "--ratio", "0.1")
    _, many = run(capsys, *given, *scorers, "--ratio", "0.8")
    assert float(few["density"]) < 0.3 < 0.7 < float(many["density"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["FOLDER", "--image", "none.png", "?"], "image must be a file, got 'none.png'"),
        (["FOLDER", "--file", "none.txt", "?"], "file must be a file, got 'none.txt'"),
        (["FOLDER", "--image", "PICTURE", "?"],
         "image must not be given to a model that takes text alone, got '.*0.png' for"),
        (["FOLDER", "--file", "PICTURE", "?"], "file must hold UTF-8 text, got '.*0.png'"),
        (["./nothing/here", "?"], "folder must be a folder with a model, .* got './nothing/here'"),
        (["nothing", "?"], "folder must be a folder with a model, .* got 'nothing'"),
        (["HOME", "?"], "folder must hold a model of transformers, got"),
        (["BARE", "?"], "folder must hold a processor or a tokenizer, got"),
        (["FOLDER", "--device", "abacus", "?"], "device must be one of this machine, got 'abacus'"),
        (["FOLDER", "--dtype", "float7", "?"], "dtype must be 'auto' or a dtype .* 'float7'"),
        (["FOLDER", "--scorers", "smollm2-135m", "?"], "scorers must fit the model, got"),
        (["SEES", "--image", "TEXT", "?"], "image .*long.txt: cannot identify"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(
    folders: dict[str, str], argv: list[str], message: str
) -> None:
    home = folders["home"]
    places = {
        "FOLDER": folders["text"], "HOME": home, "PICTURE": f"{home}/0.png", "BARE": f"{home}/bare",
        "SEES": folders["qwen2_5_vl"], "TEXT": f"{home}/long.txt",
    }  # fmt: skip
    with pytest.raises(SystemExit, match=f"^mm-sparse generate: {message}"):
        generate_command.main([places.get(word, word) for word in argv])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["folder"], "QUESTION must be given as the last argument"),
        (["folder", "--image", __file__], "QUESTION must be given as the last argument"),
        (["folder", "--dense", "--ratio", "0.1", "?"], "--ratio must not be given with --dense"),
        (["folder", "--scorers", "x", "--unit", "16", "?"], "--unit must not be given with"),
    ],
)
def test_arguments_that_exclude_each_other(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        generate_command.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["folder", "--image", "a.png", "b.png", "What?"],
        ["folder", "--image", "a.png", "--image", "b.png", "What?"],
        ["folder", "What?", "--image", "a.png", "b.png"],
        ["--static", "folder", "--image", "a.png", "b.png", "--ratio", "0.1", "What?"],
    ],
)
def test_the_question_is_found_behind_files(argv: list[str]) -> None:
    args = generate_command.parse(argv)
    assert (args.folder, args.question) == ("folder", "What?")
    assert args.image == ["a.png", "b.png"]


def test_the_spinner_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(generate_command.spinner("Reading"), nullcontext)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    with generate_command.spinner("Reading") as status:
        assert status.status == "Reading"


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--ratio", "0.3"], ["--dense"]], ids=["sparse", "dense"])
def test_two_processes_say_what_one_says(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    home = Path(folders["home"])
    argv = [folders["text"], *SHORT, "--file", str(home / "long.txt"), *more, QUESTION]
    answer, table = run(capsys, *argv)
    root = Path(__file__).resolve().parents[3]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
         "-m", "mm_sparse.cli", "generate", *argv],
        cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # One of the two prints.
    assert done.stdout.strip() == answer.strip()
    assert done.stderr.count("first token") == 1
    assert table["sparse layers"] in done.stderr or "--dense" in more


def test_a_cache_of_fixed_size_is_not_for_several_processes(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        generate_command.main([folders["text"], "--static", QUESTION])
    assert "--static must not be given to several processes" in capsys.readouterr().err
