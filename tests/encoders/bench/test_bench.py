"""What is timed, how it is written down, and that one run's failure is not the others'."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F

from mm_sparse.bench.results import Session
from mm_sparse.encoders.bench import attention_stubs, profiling, report, run as program
from mm_sparse.encoders.bench.attention_stubs import FreeAttention, core, eager
from mm_sparse.encoders.bench.cases import CASES, TINY

for needed in ("timm", "torchaudio"):
    pytest.importorskip(needed)

QUICK = ["--rounds", "2", "--repeats", "1"]
SPARSE = ["sparse units of 16", "sparse units of 64", "sparse units of 16, 50% sampled"]
RUNS = ["no attention core", "dense SDPA default", *SPARSE, "eager"]


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    """Tiny encoders wherever the tests run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(what, ms, **known):
    return {"what": what, "ms": ms, **known}


def raced(name="vit-b-2048"):
    return program.Race(TINY[name], "cpu", torch.float32, Session())


def test_the_ceiling_costs_the_rest_and_a_share_of_the_core():
    assert report.ceiling(10.0, 2.0, 0.2) == pytest.approx(10 / (2 + 0.2 * 8))
    assert report.ceiling(10.0, 2.0, 1.0) == 1.0
    # A rest that took longer than the whole says nothing of the core.
    assert report.ceiling(10.0, 11.0, 0.2) == pytest.approx(10 / 11)


def test_sparse_is_held_against_the_fastest_dense_and_the_ceiling():
    found = report.compared(
        [
            run("no attention core", 2.0, above_weights_mib=10.0),
            run("dense SDPA default", 12.0, above_weights_mib=100.0),
            run("dense SDPA cuDNN", 10.0, above_weights_mib=100.0),
            {"what": "dense SDPA FlashAttention-2"},
            run("sparse units of 16", 4.0, above_weights_mib=90.0, sparse_layers=12),
            run("sparse units of 64", 5.0, above_weights_mib=90.0, sparse_layers=0),
            run("eager", 40.0, above_weights_mib=900.0),
        ],
        0.2,
    )
    assert found["fastest_dense"] == "dense SDPA cuDNN"
    assert found["dense_over_rest"] == 5.0
    assert found["ceiling"] == round(10 / 3.6, 3)
    first, second = found["sparse"]
    assert (first["times_dense"], first["times_dense SDPA default"]) == (2.5, 3.0)
    assert first["share_of_ceiling"] == 0.9
    assert (first["memory_of_eager"], first["memory_of_dense SDPA cuDNN"]) == (0.1, 0.9)
    assert second["share_of_ceiling"] is None


def test_without_a_dense_run_nothing_is_compared():
    found = report.compared([run("sparse units of 16", 4.0, sparse_layers=2)], 0.2)
    assert (found["fastest_dense"], found["ceiling"], found["sparse"]) == (None, None, [])


def test_a_time_is_the_median_of_the_medians_of_rounds():
    made = report.timed([[1.0, 9.0, 2.0], [4.0], [3.0, 3.0]])
    assert made == {"ms": 3.0, "low_ms": 2.0, "high_ms": 4.0, "rounds_ms": [2.0, 4.0, 3.0]}


@pytest.mark.parametrize("name", ["vit-b-2048", "wav2vec2-600s"])
def test_the_core_is_replaced_and_shapes_stay(name):
    race = raced(name)
    own = F.scaled_dot_product_attention
    with torch.inference_mode():
        want, _ = race.encoder(race.batch)
        with core(FreeAttention()):
            none, _ = race.encoder(race.batch)
        with core(eager):
            slow, _ = race.encoder(race.batch)
    assert F.scaled_dot_product_attention is own
    assert none.shape == want.shape
    assert not torch.allclose(none, want, atol=1e-3)
    torch.testing.assert_close(slow, want, atol=1e-4, rtol=1e-4)


def test_the_free_core_gives_what_it_first_gave_as_flash_attention_lays_it_out():
    free = FreeAttention()
    q, k, v = torch.randn(3, 2, 4, 8, 16).unbind()
    out = free(q, k, v, attn_mask=None, dropout_p=0.0)
    assert torch.equal(out, v)
    assert out.transpose(1, 2).is_contiguous()
    assert free(q, k, v + 1) is out
    with pytest.raises(ValueError, match=r"value must have the shape of query, \(2, 4, 8, 16\)"):
        free(q, k, v[..., :8])


def test_a_tower_that_does_not_call_the_core_is_named():
    with pytest.raises(ValueError, match=r"must call torch\.nn\.functional\.scaled_dot_product"):  # noqa: SIM117
        with core(FreeAttention()):
            torch.zeros(1)


def test_eager_attention_estimates_its_memory_first(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(attention_stubs, "room_on", lambda device: 1 << 20)
    q = torch.randn(1, 2, 512, 16).as_subclass(OnGpu)
    with pytest.raises(MemoryError, match=r"needs 0\.0 GiB for logits and weights, 0\.0 GiB are"):
        eager(q, q, q)
    with pytest.raises(NotImplementedError, match="without masks and dropout"):
        eager(q, q, q, is_causal=True)


def test_sparse_encoders_share_the_weights_of_the_dense_one():
    race = raced()
    made = race.sparse("sparse", 64, 0.0)
    dense = dict(race.encoder.named_parameters())
    assert all(p.data_ptr() == dense[n].data_ptr() for n, p in made.encoder.named_parameters())
    config = TINY["vit-b-2048"].config(64, 0.2)
    assert (config.causal, config.sinks, config.window, config.tile) == (False, 0, 0, 128)


def test_the_file_has_all_cases(tmp_path, capsys):
    out = tmp_path / "made" / "speed.json"
    program.main(["--out", str(out), *QUICK])
    content = json.loads(out.read_text())
    assert content["weights"].startswith("random")
    assert {"torch", "timm", "torchaudio"} <= set(content["machine"])
    assert list(content["cases"]) == list(CASES) == list(TINY)
    for name, case in content["cases"].items():
        assert [row["what"] for row in case["runs"]] == RUNS, name
        assert all(len(row["rounds_ms"]) == 2 for row in case["runs"])
        assert case["fastest_dense"] == "dense SDPA default"
        assert [row["what"] for row in case["sparse"]] == SPARSE
        assert case["skipped"] == []
    long, short = content["cases"]["wav2vec2-600s"], content["cases"]["vit-b-512"]
    assert [row.get("sparse_layers") for row in long["runs"]] == [None, None, 2, 2, 2, None]
    assert all(row["density"] < 0.5 for row in long["runs"] if "density" in row)
    assert long["sparse"][0]["share_of_ceiling"] is not None
    dense = short["runs"][2]
    assert (dense["sparse_layers"], dense["density"]) == (0, 1.0)
    assert dense["reasons"] == ["never reaches dense_below (3072): 197 tokens at most"]
    assert short["sparse"][0]["share_of_ceiling"] is None
    table = capsys.readouterr().out
    assert "| case | run | ms (spread) |" in table
    assert table.count("| vit-l-1792 |") == len(RUNS)


def test_a_run_out_of_memory_is_written_down_and_the_others_go_on(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.4 GiB\nmore")

    monkeypatch.setattr(program, "eager", full)
    out = tmp_path / "speed.json"
    program.main(["--out", str(out), "--cases", "vit-b-2048", "vit-b-512", *QUICK])
    for case in json.loads(out.read_text())["cases"].values():
        assert [row["what"] for row in case["runs"]] == RUNS[:-1]
        why = "OutOfMemoryError: CUDA out of memory. Tried to allocate 6.4 GiB"
        assert case["skipped"] == [{"what": "eager", "why": why}]


def test_a_case_that_cannot_be_built_is_written_down_and_the_others_go_on(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no room for the image")

    monkeypatch.setattr(TINY["vit-b-2048"].__class__, "batch", lambda self: broken())
    out = tmp_path / "speed.json"
    program.main(["--out", str(out), *QUICK])
    cases = json.loads(out.read_text())["cases"]
    assert list(cases) == list(CASES)
    assert cases["vit-b-512"]["skipped"][0]["why"] == "RuntimeError: no room for the image"


def test_memory_is_what_a_run_adds_and_backends_that_fail_are_named(monkeypatch):
    race = raced()
    before, peak = 7 * program.MIB, 19 * program.MIB
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: before)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    monkeypatch.setattr(
        program.Race, "sparse", lambda self, *kind: program.Run("sparse", self.encoder)
    )
    monkeypatch.setattr(program, "modes", lambda encoder: {"sparse_layers": 2})
    race.device = "cuda"
    race.enter([16])
    race.turns(1, 1)
    found = race.result()
    resident = (race.weights + race.batch.nbytes) / program.MIB
    for row in found["runs"]:
        assert row["above_weights_mib"] == 12.0
        assert row["peak_mib"] == round(12 + resident, 1)
    forced = ["dense SDPA cuDNN", "dense SDPA FlashAttention-2"]
    run = [row["what"] for row in found["runs"] + found["skipped"]]
    assert set(forced) <= set(run)
    # No cuDNN on a CPU.
    assert found["skipped"][0]["what"] == forced[0]
    assert found["sparse"][0]["memory_of_dense SDPA default"] == 1.0


def test_lines_that_wait_for_the_device_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)

    def forward():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype", stacklevel=1)

    ((place, count),) = profiling.waits(forward).items()
    assert "test_bench.py:" in place
    assert count == 3


def test_after_the_time_of_a_case_nothing_starts(tmp_path, capsys):
    out = tmp_path / "speed.json"
    program.main(["--out", str(out), "--cases", "vit-b-512", "--seconds", "0", *QUICK])
    (case,) = json.loads(out.read_text())["cases"].values()
    assert case["runs"] == []
    assert [row["what"] for row in case["skipped"]] == RUNS
    assert "the 0 s of --seconds are over" in capsys.readouterr().out


def test_a_profile_names_what_took_the_time(tmp_path, capsys):
    out = tmp_path / "profile.json"
    program.main(["--profile", "vit-b-2048", "--units", "16", "--out", str(out)])
    (case,) = json.loads(out.read_text())["cases"].values()
    found = case["profiles"]["sparse units of 16"]
    assert "mm_sparse::attend" in [row["what"] for row in found["kernels"]]
    assert found["launched_ms"] <= found["ms"]
    shown = capsys.readouterr().out
    assert "the host was done after" in shown
    assert "aten::" in shown
