"""Runs of the vision-language model that resume, and weights that go from one to another."""

import lightning as L
import pytest
import torch

from mm_sparse.recipes.data.datamodule import SampleData
from mm_sparse.recipes.datasets.digits import DigitTokenizer
from mm_sparse.recipes.training.objectives import Objectives
from mm_sparse.recipes.training.optimizer import OptimizerConfig
from tests.recipes.models.test_vlm import SPARSE, canvases, model


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    def fit(steps, path=None):
        # One batch: which batches follow a checkpoint inside an epoch is Lightning's affair.
        data = SampleData(canvases(2), DigitTokenizer(), patch_size=4, batch_size=2)
        data.train_dataloader = lambda: data.loader(data.train)
        vlm = model(SPARSE, objectives=Objectives(scorers=0.1))
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=tmp_path,
        )
        # The schedule must not depend on where a run stops.
        vlm.optimizer_part = OptimizerConfig(lr=1e-3, warmup=1000)
        trainer.fit(vlm, data, ckpt_path=path)
        return trainer, vlm

    _, whole = fit(4)
    trainer, _ = fit(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(4, tmp_path / "half.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert any(name.startswith("scorers.") for name in whole.state_dict())


def saved(folder, source):
    path = folder / "last.ckpt"
    torch.save({"state_dict": source.state_dict()}, path)
    return str(path)


def test_a_sparse_model_starts_from_a_dense_checkpoint_and_the_other_way_round(tmp_path):
    source = model()
    for value in source.parameters():
        torch.nn.init.normal_(value)
    sparse = model(SPARSE, weights=saved(tmp_path, source))
    for name, value in source.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], value)
    untrained = model(SPARSE).scorers.state_dict()
    assert untrained
    for name, value in sparse.scorers.state_dict().items():
        assert torch.equal(untrained[name], value)
    for value in sparse.scorers.parameters():
        torch.nn.init.normal_(value)
    path = saved(tmp_path, sparse)
    again = model(SPARSE, weights=path).scorers.state_dict()
    assert all(torch.equal(again[n], v) for n, v in sparse.scorers.state_dict().items())
    assert torch.equal(model(weights=path).projector.places, source.projector.places)


def test_weights_of_another_model_are_refused(tmp_path):
    source = model(SPARSE)
    state = {n: v for n, v in source.state_dict().items() if n != "projector.places"}
    torch.save({"state_dict": {**state, "other": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"lacks \['projector.places'\] and has \['other'\]"):
        model(weights=str(tmp_path / "other.ckpt"))
    with pytest.raises(ValueError, match=r"weights must be a checkpoint, got 'nowhere\.ckpt'"):
        model(weights="nowhere.ckpt")
