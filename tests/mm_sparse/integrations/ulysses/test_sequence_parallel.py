"""Two and four processes (gloo) that share sequences give what one process gives."""

import pytest
import torch

from mm_sparse.integrations.ulysses.tower_split import shared_out
from tests.support.process_runs import run_processes
from tests.support.sequence_run import SCENARIOS, TOWERS, scenarios_for

SLOW = {2: (), 4: pytest.mark.slow}
SIZES = [pytest.param(size, marks=marks) for size, marks in SLOW.items()]
CASES = [
    pytest.param(size, name, marks=marks)
    for size, marks in SLOW.items()
    for name in scenarios_for(size)
]
PADDED = ("padded", "padded documents", "dense padded", "pictures", "pictures, deep", *TOWERS)
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of a scenario alone and together, by number of processes."""
    found = {}

    def of(size):
        if size not in found:
            file = tmp_path_factory.mktemp("sequence") / "outcomes.pt"
            found[size] = run_processes("sequence_run.py", size, file, 840)
        return found[size]

    return of


@pytest.mark.parametrize(("size", "name"), CASES)
def test_loss_and_gradients_are_those_of_one_process(outcomes, size, name):
    alone, together = outcomes(size)[name]
    assert torch.isfinite(alone["loss"])
    torch.testing.assert_close(together["loss"].double(), alone["loss"].double(), rtol=1e-6, atol=0)
    tokens = alone["logits"].shape[1]
    real = SCENARIOS[name].batch().get("attention_mask")
    real = torch.ones(alone["logits"].shape[:2]).bool() if real is None else real.bool()
    # The first process has the first rows.
    logits = together["logits"][:, :tokens]
    real = real[: len(logits)]
    wanted = alone["logits"][: len(logits)]
    torch.testing.assert_close(logits[real], wanted[real], rtol=1e-6, atol=1e-8)
    assert alone["grads"].keys() == together["grads"].keys()
    for key, wanted in alone["grads"].items():
        error = (together["grads"][key] - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert error < 1e-7, key


@pytest.mark.parametrize(("size", "name"), CASES)
def test_units_are_those_of_one_process_bit_for_bit(outcomes, size, name):
    alone, together = outcomes(size)[name]
    assert alone["sparse"] == together["sparse"]
    assert alone["units"].keys() == together["units"].keys()
    assert any(alone["sparse"].values()) == bool(alone["units"])
    for key, (index, count) in alone["units"].items():
        other, counted = together["units"][key]
        tiles = index.shape[2]
        index, count = index[: len(other)], count[: len(other)]
        # Tiles of padding at the end, if any, are those of nobody.
        assert counted.shape[2] == tiles or name in PADDED
        real = count > 0 if name in PADDED else torch.ones_like(count, dtype=torch.bool)
        assert torch.equal(counted[:, :, :tiles][real], count[real])
        live = torch.arange(index.shape[3]) < count[..., None]
        assert torch.equal(other[:, :, :tiles, : index.shape[3]][live], index[live])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [n for n, s in SCENARIOS.items() if s.distilled])
def test_scorers_of_all_heads_learn(outcomes, size, name):
    alone, together = outcomes(size)[name]
    assert alone["scorer_loss"] > 0
    torch.testing.assert_close(together["scorer_loss"], alone["scorer_loss"], rtol=1e-6, atol=0)
    maps = [k for k in together["grads"] if k.startswith("model/") and "key_" in k]
    assert len(maps) == 2
    for key in maps:
        assert together["grads"][key].abs().sum((0, 2, 3)).min() > 0


@pytest.mark.parametrize("name", TOWERS)
def test_each_process_encodes_some_images(outcomes, name):
    alone, together = outcomes(2)[name]
    assert len(together["encoded"]) == len(alone["encoded"])
    assert sum(together["encoded"]) == sum(alone["encoded"]) // 2


@pytest.mark.parametrize(
    ("images", "ranks", "first", "sizes"),
    [
        ([4, 4], 2, (0, 1, 2), (4, 4)),
        ([4, 4], 4, (0, 0, 1, 1, 2), (4, 4, 4, 4)),
        ([9, 1, 1, 1, 9], 2, (0, 2, 5), (10, 11)),
        ([100, 1, 1], 2, (0, 1, 3), (100, 2)),
        ([1, 1, 100], 3, (0, 2, 3, 3), (2, 100, 1)),
    ],
)
def test_images_are_shared_out_in_their_order(images, ranks, first, sizes):
    for rank in range(ranks):
        share = shared_out(images, ranks, rank)
        assert share.own == share.sizes[rank]
    assert share.first == first
    assert share.sizes == sizes
