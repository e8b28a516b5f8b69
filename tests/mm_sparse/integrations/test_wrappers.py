"""What wraps, merges, copies or moves a sparsified model afterwards: it stays one."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mm_sparse as mms
from mm_sparse.integrations import is_sparsified
from tests.support import hf_models, tower_models

pytest.importorskip("transformers")
SPARSE = hf_models.SPARSE
FEWER = mms.SparseConfig(ratio=0.2, dense_below=0, sinks=0, window=16)


def llama() -> tuple[Any, Callable[[Any], Tensor]]:
    case = hf_models.build("llama")
    ids = hf_models.long_ids(200)
    return case.model, lambda m: m(ids).logits


def vit() -> tuple[Any, Callable[[Any], Tensor]]:
    pytest.importorskip("timm")
    case = tower_models.build("dinov2_registers")
    return case.model, lambda m: case.run(m)[0]


MODELS = {"llama": llama, "vit": vit}


class Bigger(nn.Module):
    """A module of one's own around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def distributed(model: nn.Module) -> nn.Module:
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, world_size=1, rank=0)
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "own": Bigger,
    "ddp": distributed,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "average": torch.optim.swa_utils.AveragedModel,
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.fixture(autouse=True, scope="module")
def no_group_is_left() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def assert_alike(found: Any, want: Any) -> None:
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_wrapped_model_is_reported_saved_changed_and_densified(
    name: str, wrapper: str, tmp_path: Path
) -> None:
    model, run = MODELS[name]()
    dense = run(model)
    mms.sparsify(model, SPARSE, scorer="relevance")
    sparse = run(model)
    wrapped = WRAPPERS[wrapper](model)
    if wrapper in ("average", "copy", "pickle"):
        # Copies: the first model must not matter any more.
        mms.densify(model)
        del model
    assert_alike(run(wrapped), sparse)
    rows = mms.report(wrapped).rows
    assert {row.mode for row in rows} == {"sparse"}
    modules = dict(wrapped.named_modules())
    assert all(row.name in modules for row in rows)
    assert len(mms.scorers_of(wrapped)) == len(rows)
    mms.save_scorers(wrapped, tmp_path / "scorers")
    with mms.override_config(wrapped, ratio=1.0):
        assert_alike(run(wrapped), dense)
    before = dict(mms.scorers_of(wrapped))
    mms.sparsify(wrapped, FEWER)
    assert mms.sparse_config(wrapped) == FEWER
    assert all(before[key] is scorer for key, scorer in mms.scorers_of(wrapped).items())
    mms.densify(wrapped)
    assert not is_sparsified(wrapped)
    assert_alike(run(wrapped), dense)
    fresh, run = MODELS[name]()
    mms.load_scorers(fresh, tmp_path / "scorers")
    assert mms.sparse_config(fresh) == SPARSE
    assert_alike(run(fresh), sparse)


@torch.no_grad()
def test_saved_through_a_wrapper_budgets_go_by_the_names_of_the_wrapper(tmp_path: Path) -> None:
    model, run = vit()
    names = list(mms.attention_layers(mms.sparsify(model, SPARSE)))
    config = mms.SparseConfig(
        ratio=0.3, dense_below=0, sinks=0, window=16,
        layer_ratio={names[0]: 0.5}, dense_layers=(names[1],),
    )  # fmt: skip
    mms.sparsify(model, config, scorer="relevance")
    sparse = run(model)
    mms.save_scorers(Bigger(model), tmp_path)
    fresh, run = vit()
    mms.load_scorers(Bigger(fresh), tmp_path)
    assert_alike(run(fresh), sparse)
    other, run = vit()
    mms.load_scorers(other, tmp_path)
    assert_alike(run(other), sparse)


@torch.no_grad()
def test_lora_around_a_model_and_its_merge_keep_the_state(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    model, run = llama()
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    wrapped = peft.get_peft_model(model, lora).eval()
    dense = run(wrapped)
    mms.sparsify(wrapped, SPARSE, scorer="relevance")
    sparse = run(wrapped)
    merged = wrapped.merge_and_unload()
    del wrapped, model
    assert_alike(run(merged), sparse)
    assert {row.mode for row in mms.report(merged).rows} == {"sparse"}
    mms.save_scorers(merged, tmp_path)
    mms.sparsify(merged, FEWER)
    assert not torch.allclose(run(merged), sparse)
    mms.densify(merged)
    assert_alike(run(merged), dense)
    mms.load_scorers(merged, tmp_path)
    assert_alike(run(merged), sparse)


@torch.no_grad()
def test_a_sparsified_model_takes_lora_afterwards() -> None:
    peft: Any = pytest.importorskip("peft")
    model, run = llama()
    dense = run(model)
    mms.sparsify(model, SPARSE)
    sparse = run(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=4)).eval()
    assert_alike(run(wrapped), sparse)
    mms.densify(wrapped)
    assert_alike(run(wrapped), dense)


@pytest.mark.parametrize("scorer", [None, "relevance", "fine"])
@torch.no_grad()
def test_weights_that_are_kept_elsewhere_take_scorers(scorer: Any, tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    model, run = llama()
    mms.sparsify(model, SPARSE, scorer=scorer)
    want = run(model)
    mms.save_scorers(model, tmp_path)
    offloaded, _ = llama()
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    mms.sparsify(offloaded, SPARSE, scorer=scorer)
    assert run(offloaded).shape == want.shape
    mms.densify(offloaded)
    mms.load_scorers(offloaded, tmp_path)
    assert_alike(run(offloaded), want)


@torch.no_grad()
def test_parts_that_were_sparsified_each_for_itself_become_one() -> None:
    pytest.importorskip("timm")
    (one, run_one), (two, run_two) = llama(), vit()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = one, two

    both, dense = Both(), (run_one(one), run_two(two))
    mms.sparsify(one, SPARSE, scorer="relevance")
    mms.sparsify(two, FEWER)
    with pytest.raises(ValueError, match=r"parts are, each for itself \(LlamaForCausalLM, Vision"):
        mms.report(both)
    scorers = list(mms.scorers_of(one).values())
    mms.sparsify(both, SPARSE)
    assert mms.sparse_config(two) == SPARSE
    assert list(mms.scorers_of(both).values()) == scorers
    with pytest.raises(ValueError, match="must be a whole sparsified model, got a LlamaForCa"):
        mms.densify(one)
    mms.densify(both)
    assert_alike((run_one(one), run_two(two)), dense)


@torch.no_grad()
def test_who_sets_another_attention_is_named_in_the_report() -> None:
    model, run = llama()
    dense = run(model)
    mms.sparsify(model, SPARSE)
    sparse = run(model)
    model.set_attn_implementation("eager")
    assert_alike(run(model), dense)
    rows = mms.report(model).rows
    assert {row.mode for row in rows} == {"dense"}
    assert all("set_attn_implementation('eager')" in row.reason for row in rows)
    mms.sparsify(model, SPARSE)
    assert_alike(run(model), sparse)
    mms.densify(model)
    assert model.config._attn_implementation == "eager"
