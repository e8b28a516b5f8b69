"""Wrong settings, missing packages and missing data end a recipe with one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("jsonargparse")
from mm_sparse.cli.inspect import main as inspect_command
from mm_sparse.recipes.run import lightning_cli, recipes_command, sparse_vs_dense
from mm_sparse.recipes.run.settings_cli import SettingsError, program, sentence

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / "recipes" / "configs" / "vlm" / "digits.yaml"


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe"])


def refused(capsys: pytest.CaptureFixture[str], *options: str, config: Path = DIGITS) -> str:
    """The last line of what a recipe says to these options; it says little."""
    with pytest.raises(SystemExit) as ended:
        program(lambda: lightning_cli.main(["fit", f"--config={config}", *options]))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 5
    return lines[-1]


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("--trainer.max_stesp=3", "trainer.max_stesp is no setting; did you mean"
         " trainer.max_steps?"),
        ("--data.batch_sise=3", "data.batch_sise is no setting; did you mean data.batch_size?"),
        ("--model.sparse.rato=1", "model.sparse: rato is no argument of mm_sparse.SparseConfig; "
         "did you mean ratio?"),
        ("--model.sparse.ratio=x", "model.sparse.ratio: must be float, got 'x'"),
        ("--model.sparse.ratio=3", "ratio must be in (0, 1], got 3.0"),
        ("--data.train=mm_sparse.recipes.datasets.digits.DigitCanvase",
         "mm_sparse.recipes.datasets.digits has no DigitCanvase; did you mean "
         "DigitCanvases?"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_sentence(
    option: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, option, "--model.vision.weights=null")
    assert said.removeprefix("error: ") == wanted


@pytest.mark.parametrize(
    ("part", "key", "meant"),
    [("trainer", "max_stesp", "trainer.max_steps"), ("sparse", "rato", "ratio")],
)
def test_a_mistyped_key_of_a_file_is_one_sentence(
    part: str, key: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = yaml.safe_load(DIGITS.read_text())
    (record["trainer"] if part == "trainer" else record["model"]["init_args"][part])[key] = 1
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(record))
    assert refused(capsys, config=file).endswith(f"did you mean {meant}?")


def test_a_message_without_structure_stays_as_it_is() -> None:
    assert sentence("no such file") == "no such file"


def test_comparing_runs_without_validation_data_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", [
        "sparse_vs_dense", f"--config={DIGITS}", f"--out={out}", "--data.validation=null",
        "--model.vision.weights=null", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
    ])  # fmt: skip
    with pytest.raises(SystemExit):
        program(sparse_vs_dense.main)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: data.validation of {DIGITS} must be given, got None"
    assert not out.exists()


def without(package: str, folder: Path, *command: str) -> str:
    """What a Python command says where a package is missing."""
    text = f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')\n"
    (folder / f"{package}.py").write_text(text)
    paths = os.pathsep.join([str(folder), str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode != 0
    return done.stderr.strip()


@pytest.mark.parametrize(
    ("package", "extra", "module"),
    [
        ("lightning", "train", "mm_sparse.recipes.run.lightning_cli"),
        ("jsonargparse", "train", "mm_sparse.recipes.run.lightning_cli"),
        ("lightning", "train", "mm_sparse.recipes.run.sparse_vs_dense"),
        ("timm", "vision", "mm_sparse.recipes.run.lightning_cli"),
    ],
)
def test_a_program_names_the_extra_that_is_missing(
    package: str, extra: str, module: str, tmp_path: Path
) -> None:
    options = ["fit", f"--config={DIGITS}", "--model.vision.weights=null"]
    said = without(package, tmp_path, "-m", module, *options)
    assert "Traceback" not in said
    wanted = f"No module named '{package}'; pip install \"mm-sparse[{extra}]\" brings it"
    assert said.splitlines()[-1].endswith(wanted)


def test_commands_and_imports_name_the_extra_that_is_missing(tmp_path: Path) -> None:
    wanted = "No module named 'lightning'; pip install \"mm-sparse[train]\" brings it"
    for command in (
        ["-m", "mm_sparse.cli.main", "recipes", "run", "vlm/digits"],
        ["-m", "mm_sparse.cli.main", "inspect", "mm_sparse.recipes.run.inspect_recipe:recipe"],
        ["-c", "from mm_sparse.recipes.models import MultimodalLM"],
    ):
        assert without("lightning", tmp_path, *command).endswith(wanted)


def test_inspect_says_in_a_sentence_that_its_target_is_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        inspect_command(["no_module:x"])
    assert "target must be MODULE:FUNCTION, got 'no_module:x'" in capsys.readouterr().err


def test_wrong_settings_are_value_errors_for_programs() -> None:
    assert issubclass(SettingsError, ValueError)
    with pytest.raises(SystemExit):
        recipes_command.main(["run", str(DIGITS), "--model.sparse.ratio=3"])


def test_validate_without_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        f"--config={DIGITS}", "--data.validation=null", "--model.vision.weights=null",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu",
    ]  # fmt: skip
    for command, split in (("validate", "validation"), ("test", "test")):
        with pytest.raises(SystemExit):
            program(lambda command=command: lightning_cli.main([command, *options]))
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == f"error: data.{split} must be given, got None"
