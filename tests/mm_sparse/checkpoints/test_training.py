"""Scorers are saved, resumed and averaged with the model that is trained."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mm_sparse as mms
from mm_sparse.integrations import state_of
from tests.support import hf_models

tf: Any = pytest.importorskip("transformers")
CONFIG = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=0, window=16)


def batch(step: int) -> Tensor:
    return torch.randint(3, 99, (2, 120), generator=torch.Generator().manual_seed(step))


def fresh() -> Any:
    model = hf_models.build("llama").model.train()
    torch.manual_seed(1)
    return mms.sparsify(model, CONFIG, scorer="relevance")


def loss_of(model: Any, ids: Tensor) -> Tensor:
    with mms.distillation_losses(model) as losses:
        loss = model(ids, labels=ids, use_cache=False).loss
    return loss + losses.mean()


def weights(model: Any) -> list[Tensor]:
    own = (*model.parameters(), *mms.scorer_parameters(model))
    return [p.detach().clone() for p in {id(p): p for p in own}.values()]


def train(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()


def test_a_plain_loop_with_registered_scorers_resumes_bit_for_bit() -> None:
    whole = mms.register_scorers(fresh())
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    train(whole, optimizer, range(4))

    half = mms.register_scorers(fresh())
    optimizer = torch.optim.AdamW(half.parameters(), lr=1e-2)
    train(half, optimizer, range(2))
    saved = copy.deepcopy({"model": half.state_dict(), "optimizer": optimizer.state_dict()})
    assert any(key.startswith("mm_sparse_scorers.") for key in saved["model"])
    resumed = mms.register_scorers(fresh())
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(2, 4))
    for found, want in zip(weights(resumed), weights(whole), strict=True):
        assert found.equal(want)
    start = weights(fresh())
    assert all(not a.equal(b) for a, b in zip(weights(whole), start, strict=True))


def test_the_state_of_scorers_alone_goes_into_a_checkpoint_of_ones_own() -> None:
    model = fresh()
    train(model, torch.optim.AdamW(mms.scorer_parameters(model), lr=1e-2), range(1))
    state = copy.deepcopy(mms.scorer_state(model))
    other = fresh()
    other.load_state_dict(model.state_dict())
    mms.load_scorer_state(other, state)
    for found, want in zip(weights(other), weights(model), strict=True):
        assert found.equal(want)
    with pytest.warns(UserWarning, match="the checkpoint holds no scorers"):
        mms.load_scorer_state(other, None)
    with pytest.raises(ValueError, match="state must be of the model's scorers"):
        mms.load_scorer_state(other, {"x": torch.zeros(1)})


def test_a_checkpoint_without_scorers_loads_with_a_warning() -> None:
    model = fresh()
    stock = model.state_dict()
    mms.register_scorers(model)
    before = weights(model)
    with pytest.warns(UserWarning, match="the checkpoint holds no scorers"):
        model.load_state_dict(stock)
    assert all(a.equal(b) for a, b in zip(weights(model), before, strict=True))


def test_registered_scorers_follow_sparsify_and_go_with_densify() -> None:
    model = hf_models.build("llama").model
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="model must be sparsified"):
        mms.register_scorers(model)
    mms.sparsify(model, CONFIG)
    with pytest.raises(ValueError, match="must have scorers with weights to register"):
        mms.register_scorers(model)
    mms.register_scorers(mms.sparsify(model, CONFIG, scorer="relevance"))
    mms.sparsify(model, CONFIG, scorer="fine")
    held = set(map(id, model.get_submodule("mm_sparse_scorers").modules()))
    assert all(id(scorer) in held for scorer in mms.scorers_of(model).values())
    mms.densify(model)
    assert list(model.state_dict()) == names


def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    L: Any = pytest.importorskip("lightning")

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = fresh()

        def training_step(self, index: Tensor, _: int) -> Tensor:
            return loss_of(self.model, batch(self.global_step))

        def configure_optimizers(self) -> Any:
            own = (*self.parameters(), *mms.scorer_parameters(self.model))
            return torch.optim.AdamW(own, lr=1e-2)

    def run(steps: int, callbacks: list[Any], resume: Path | None = None) -> Any:
        module = Module()
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
            default_root_dir=tmp_path,
        )  # fmt: skip
        # Whole epochs of two steps: Lightning warns of others.
        trainer.fit(module, torch.arange(2), ckpt_path=resume, weights_only=False)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module.model

    callback = [mms.LightningScorerCallback()]
    whole = run(4, callback)
    run(2, callback)
    resumed = run(4, callback, tmp_path / "2.ckpt")
    for found, want in zip(weights(resumed), weights(whole), strict=True):
        assert found.equal(want)
    run(2, [])
    with pytest.warns(UserWarning, match="the checkpoint holds no scorers"):
        run(4, callback, tmp_path / "2.ckpt")


@pytest.mark.parametrize("registered", [True, False])
def test_trainer_resumes_bit_for_bit(tmp_path: Path, registered: bool) -> None:
    pytest.importorskip("accelerate")

    class Trainer(tf.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            return loss_of(model, inputs["input_ids"])

    def run(steps: int, folder: str, resume: Path | None = None) -> Any:
        model = fresh()
        if registered:
            mms.register_scorers(model)
        options = tf.TrainingArguments(
            str(tmp_path / folder), per_device_train_batch_size=2, max_steps=steps, save_steps=2,
            learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True,
            disable_tqdm=True, logging_strategy="no", seed=3,
        )  # fmt: skip
        own = {id(p): p for p in (*model.parameters(), *mms.scorer_parameters(model))}
        trainer = Trainer(
            model, options, train_dataset=[{"input_ids": row} for row in batch(0).repeat(4, 1)],
            optimizers=(torch.optim.AdamW(list(own.values()), lr=1e-2), None),
            callbacks=[] if registered else [mms.TrainerScorerCallback(resume)],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return model

    whole = run(4, "whole")
    run(2, "half")
    resumed = run(4, "resumed", tmp_path / "half" / "checkpoint-2")
    for found, want in zip(weights(resumed), weights(whole), strict=True):
        assert found.equal(want)


def test_what_is_known_of_a_model_is_known_of_what_wraps_it() -> None:
    model = fresh()
    mms.scorers_of(nn.Sequential(model))
    assert state_of(model).shared.owned


def _work(rank: int, port: int, how: str, out: str) -> None:
    import warnings

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = fresh()
    if rank and how != "drift":
        for parameter in mms.scorer_parameters(model):
            nn.init.normal_(parameter)
    if how == "registered":
        mms.register_scorers(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    own = {id(p): p for p in (*model.parameters(), *mms.scorer_parameters(model))}
    optimizer = torch.optim.SGD(list(own.values()), lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            ids = batch(10 * step + rank)
            optimizer.zero_grad()
            with mms.distillation_losses(model) as losses:
                loss = ddp(ids, labels=ids, use_cache=False).loss
            (loss + losses.mean()).backward()
            if how == "averaged":
                mms.average_scorer_gradients(model)
            optimizer.step()
    said = [str(w.message) for w in caught if "nothing averages them" in str(w.message)]
    torch.save((weights(model), said), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["registered", "averaged", "drift"])
def test_two_processes_keep_the_same_scorers_or_are_warned(how: str, tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = str(tmp_path / "weights")
    torch.multiprocessing.spawn(_work, (port, how, out), nprocs=2)
    (one, said), (two, _) = (torch.load(f"{out}.{rank}") for rank in (0, 1))
    same = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, two, strict=True))
    assert same == (how != "drift")
    assert bool(said) == (how == "drift")
