import argparse
import json
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

import mm_sparse as mms
from mm_sparse.bench import runner, scenarios
from mm_sparse.bench.baselines import Shape, inputs
from mm_sparse.cli import bench as bench_command, main
from mm_sparse.cli.inspect import sample_of

SMALL = ["--tokens", "256", "--heads", "2/2", "--head-dims", "16", "--units", "64"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Each contestant runs once."""
    monkeypatch.setattr(runner, "median_ms", lambda run, *_: 1.0 if run() is not None else 0.0)


def test_bench_gets_its_options(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_command, "main", seen.append)
    assert main.main(["bench", "--tokens", "256"]) == 0
    assert seen == [["--tokens", "256"]]


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(["--help"])
    assert stopped.value.code == 0
    assert "  bench     Time attention" in capsys.readouterr().out


def test_help_of_a_command_is_its_own(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(["bench", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: mm-sparse bench")
    assert "--decode" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["polish"], "argument COMMAND: invalid choice: 'polish'"),
        ([], "the following arguments are required: COMMAND"),
        (["bench", "--tokens", "many"], "argument --tokens: must be a whole number from 1"),
        (["bench", "--polish"], "unrecognized arguments: --polish"),
    ],
    ids=["unknown", "none", "wrong", "unrecognised"],
)
def test_what_is_wrong_is_named(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom mm_sparse.cli import main as cli\n"
        "try: cli.main(['bench', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("options", "cuda", "shapes"),
    [
        ([], True, [(16384, 16, 16, 128, False), (16384, 32, 8, 128, True)]),
        (["--causal", "yes"], True, [(16384, 16, 16, 128, True), (16384, 32, 8, 128, True)]),
        (["--heads", "8/4", "--causal", "no"], True, [(16384, 8, 4, 128, False)]),
        (["--tokens", "64"], False, [(64, 8, 8, 64, False), (64, 8, 8, 64, True)]),
    ],
    ids=["default", "causal", "heads", "small"],
)
def test_shapes_follow_the_options(options, cuda, shapes):
    args = bench_command.bench_parser().parse_args(options)
    assert isinstance(args, argparse.Namespace)
    assert scenarios.bench_shapes(args, cuda, (16384,)) == shapes


def test_a_run_on_a_cpu_writes_json_and_csv(tmp_path):
    out = tmp_path / "folder" / "results.json"
    main.main(["bench", *SMALL, "--out", str(out)])
    content = json.loads(out.read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["options"]["units"] == [64]
    assert content["skipped"] == []
    rows = {(r["what"], r["direction"], r["causal"]) for r in content["records"]}
    for causal in (False, True):
        assert {(what, way) for what, way, c in rows if c == causal} == {
            ("dense sdpa", "forward"),
            ("dense sdpa", "backward"),
            ("attend unit 64", "forward"),
            ("attend unit 64", "backward"),
            ("score + select unit 64", "forward"),
            ("score + select + attend unit 64", "forward"),
        }
    lines = out.with_suffix(".csv").read_text().splitlines()
    assert lines[0].startswith("what,tokens,heads,head_dim,causal,direction,density,milliseconds")
    assert len(lines) == 1 + len(content["records"])


def test_only_and_causal_choose(tmp_path):
    out = tmp_path / "results.json"
    main.main(["bench", *SMALL, "--out", str(out), "--only", "sdpa", "--causal", "yes"])
    found = {(r["what"], r["causal"]) for r in json.loads(out.read_text())["records"]}
    assert found == {("dense sdpa", True)}


def test_no_time_skips_and_says_so(tmp_path, capsys):
    out = tmp_path / "results.json"
    main.main(["bench", *SMALL, "--out", str(out), "--seconds", "0", "--causal", "no"])
    content = json.loads(out.read_text())
    assert content["records"] == []
    assert {row["what"] for row in content["skipped"]} == {
        "dense sdpa",
        "attend unit 64",
        "score + select unit 64",
        "score + select + attend unit 64",
    }
    assert {row["why"] for row in content["skipped"]} == {"the 0 s of --seconds are over"}
    assert "skipped dense sdpa tokens=256" in capsys.readouterr().out


def test_one_decoding_step_counts_kept_bytes(tmp_path):
    out = tmp_path / "results.json"
    main.main(["bench", "--decode", "--tokens", "512", "--units", "16", "--out", str(out)])
    dense, sparse, *_ = json.loads(out.read_text())["records"]
    assert (dense["direction"], sparse["direction"]) == ("decode", "decode")
    assert sparse["density"] == 0.125
    size = 2 * 2 * 512 * 64 * 4
    assert dense["gb_per_s"] == pytest.approx(size / 1e6, abs=0.06)
    assert sparse["gb_per_s"] == pytest.approx(size / 8 / 1e6, abs=0.06)


def test_growth_is_the_exponent_of_the_length(tmp_path):
    out = tmp_path / "results.json"
    lengths = ["--tokens", "256", "512"]
    main.main(["bench", "--long", *lengths, "--units", "16", "--causal", "no", "--out", str(out)])
    content = json.loads(out.read_text())
    assert [r["density"] for r in content["records"]] == [1.0] * 8
    names = [row["what"].partition(" keys")[2] for row in content["growth"]]
    runs = ", runs of 16 units first"
    assert names == ["", runs, ", topics", f", topics{runs}"]
    for row in content["growth"]:
        assert (row["from"], row["to"]) == (256, 512)
        # The tests' clock says that every call takes as long.
        assert row["exponent"] == 0.0


def test_tokens_with_topics_make_neighbouring_tiles_alike():
    shape = Shape(8192, 1, 1, 64)
    layout = mms.TokenLayout.text(1, 8192)
    config = mms.SparseConfig(tokens=1024, unit=16, causal=False, dense_below=0)
    q, k, *_ = (x.detach() for x in inputs(shape, "cpu", torch.float32))
    before = scenarios._shared(q, k, layout, config)
    topics = [scenarios._with_topics(x, seed) for seed, x in enumerate((q, k))]
    assert before < 0.3 < 0.6 < scenarios._shared(*topics, layout, config) < 0.95


def test_lengths_say_where_the_whole_pays(tmp_path, capsys):
    out = tmp_path / "results.json"
    main.main(["bench", *SMALL, "--lengths", "--causal", "no", "--out", str(out)])
    content = json.loads(out.read_text())
    assert [(r["tokens"], r["lengths"]) for r in content["break_even"]] == [(256, [256])]
    assert {r["direction"] for r in content["records"]} == {"forward"}
    assert "is never slower than dense from 256 tokens" in capsys.readouterr().out


def test_inputs_that_do_not_fit_do_not_end_the_run(tmp_path, monkeypatch):
    def none_left(shape, *rest):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner, "inputs", none_left)
    out = tmp_path / "results.json"
    main.main(["bench", *SMALL, "--out", str(out)])
    (first, _) = json.loads(out.read_text())["skipped"]
    assert first["what"].startswith("Shape(tokens=256")
    assert first["why"] == "OutOfMemoryError: CUDA out of memory"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory"], "argument --memory: needs a CUDA GPU"),
        (["--tokens", "0"], "argument --tokens: must be a whole number from 1, got '0'"),
        (["--heads", "3/2"], "argument --heads: must be query heads and KV heads"),
        (["--ratio", "1.5"], "argument --ratio: must be in (0, 1], got '1.5'"),
        (["--seconds", "soon"], "argument --seconds: must be a number from 0, got 'soon'"),
        (["--only", "nobody"], "argument --only: invalid choice: 'nobody'"),
        (["--units", "17"], "argument --units: invalid choice: 17"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_wrong_option_is_named(options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main.main(["bench", *options])
    assert message in capsys.readouterr().err


def test_plot_is_refused_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setattr("mm_sparse.cli.arguments.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main.main(["bench", "--plot", "x.png"])
    assert "argument --plot: needs matplotlib" in capsys.readouterr().err


@pytest.fixture
def broken(monkeypatch):
    """Another package adds a command that cannot be imported."""
    entry = EntryPoint(name="broken", value="no_such_module:main", group=main.GROUP)
    hijack = EntryPoint(name="bench", value="no_such_module:main", group=main.GROUP)
    monkeypatch.setattr(main, "entry_points", lambda group: EntryPoints([entry, hijack]))


@pytest.mark.usefixtures("broken")
def test_a_broken_plugin_breaks_no_other_command(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        main.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "  broken    From no_such_module." in out
    assert "  bench     Time attention" in out
    seen = []
    monkeypatch.setattr(bench_command, "main", seen.append)
    assert main.main(["bench"]) == 0
    assert seen == [[]]


@pytest.mark.usefixtures("broken")
def test_a_broken_plugin_says_what_is_missing():
    with pytest.raises(SystemExit, match=r"mm-sparse broken cannot start: .*no_such_module"):
        main.main(["broken"])


def test_inspect_names_what_a_target_lacks(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import soundfile_of_nobody\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"needs_more:sample cannot be imported: No module named"):
        sample_of("needs_more:sample", [])
    with pytest.raises(ValueError, match="target must be MODULE:FUNCTION, got 'no_module:x'"):
        sample_of("no_module:x", [])
    with pytest.raises(ValueError, match="target must be MODULE:FUNCTION, got 'json:nothing'"):
        sample_of("json:nothing", [])


def test_a_quick_run_on_a_cpu_pairs_sparse_with_dense_and_shows_a_growing_table(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "results.json"
    main.main(["bench", "--quick", "--heads", "1/1", "--out", str(out)])
    records = json.loads(out.read_text())["records"]
    assert {r["tokens"] for r in records} == {4096}
    for causal in (False, True):
        names = [r["what"] for r in records if r["causal"] == causal]
        assert names[0] == "dense sdpa"
        assert {f"score + select + attend unit {unit}" for unit in (64, 16)} <= set(names)
    assert {r["direction"] for r in records} == {"forward"}
    shown = capsys.readouterr().out
    assert "Timing(" not in shown
    # Once while it runs, once at the end.
    assert shown.count("4096 tokens, heads 1/1, head dim 64, causal") == 2
