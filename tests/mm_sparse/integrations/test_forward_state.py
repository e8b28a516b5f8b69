"""What is true of a forward stays with it: threads, several images, recomputation, nested calls."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mm_sparse as mms
from tests.support import hf_models, tower_models

timm: Any = pytest.importorskip("timm")
tf: Any = pytest.importorskip("transformers")
CUT = {"tile": 64, "unit": 16, "dense_below": 0, "sinks": 0, "window": 0}
SPARSE = mms.SparseConfig(ratio=0.3, **CUT)
DENSE = mms.SparseConfig(ratio=0.3, **{**CUT, "dense_below": 10**6})
Run = Callable[[Any], Any]


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timm_vit() -> tuple[nn.Module, list[Run]]:
    options = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5, "patch_size": 4}
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, img_size=64, dynamic_img_size=True, **options)
    images = random(2, 3, 64, 96), random(2, 3, 96, 64)
    return model, [lambda m, x=x: m(x) for x in images]


def timm_naflex() -> tuple[nn.Module, list[Run]]:
    name = "naflexvit_base_patch16_gap"
    model = timm.create_model(name, num_classes=5, patch_size=4, **tower_models.WIDTH)
    images = random(2, 3, 64, 96), random(2, 3, 96, 64)
    return model, [lambda m, x=x: m(x) for x in images]


def open_clip_towers() -> tuple[nn.Module, list[Run]]:
    pytest.importorskip("open_clip")
    model = tower_models.build("clip").model
    images = random(1, 3, 48, 48), random(3, 3, 48, 48)
    make = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, 60, (rows, 77), generator=make) for rows in (1, 3)]
    return model, [
        lambda m, x=x, t=t: m.encode_image(x).sum() + m.encode_text(t).sum()
        for x, t in zip(images, texts, strict=True)
    ]


def torchaudio_wav2vec2() -> tuple[nn.Module, list[Run]]:
    pytest.importorskip("torchaudio")
    model = tower_models.build("wav2vec2_lengths").model
    waves = random(2, 16000), random(2, 24000)
    lengths = torch.tensor([16000, 9000]), torch.tensor([17000, 24000])
    return model, [lambda m, x=x, n=n: m(x, n)[0] for x, n in zip(waves, lengths, strict=True)]


def hf_vision() -> tuple[nn.Module, list[Run]]:
    sizes = {**hf_models.VISION, "image_size": 64}
    model = tf.Dinov2Model(tf.Dinov2Config(**sizes))
    images = random(2, 3, 64, 96), random(2, 3, 96, 64)
    return model, [lambda m, x=x: m(pixel_values=x).last_hidden_state for x in images]


def hf_vlm() -> tuple[nn.Module, list[Run]]:
    case = hf_models.build("qwen2_5_vl")
    inputs = case.inputs("none")
    other = {**inputs, "input_ids": torch.cat([inputs["input_ids"], hf_models.long_ids(9)], 1)}
    other["attention_mask"] = torch.ones_like(other["input_ids"])
    if case.kinds:
        other[case.kinds] = (other["input_ids"] == case.token).long()
    return case.model, [lambda m, x=x: m(**x, use_cache=False).logits for x in (inputs, other)]


MODELS = {
    "timm": timm_vit,
    "naflex": timm_naflex,
    "open_clip": open_clip_towers,
    "torchaudio": torchaudio_wav2vec2,
    "hf_vision": hf_vision,
    "hf_vlm": hf_vlm,
}
CHECKPOINTED = ("timm", "naflex", "hf_vision", "hf_vlm")


def build(name: str) -> tuple[Any, list[Run]]:
    torch.manual_seed(0)
    model, runs = MODELS[name]()
    model.eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model, runs


def set_checkpointing(model: Any, kind: str) -> None:
    """Recompute blocks in the backward pass, by the library's own switch."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(kind != "none")
    elif kind == "none":
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    model.train(kind != "none")


def gradients(model: Any, runs: list[Run], together: bool = True) -> list[Tensor]:
    """Of the sum of all runs' losses; `together`: all forwards come before the first backward."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    losses = []
    for run in runs:
        losses.append(run(model).square().mean())
        if not together:
            found = torch.autograd.grad(losses.pop(), parameters, allow_unused=True)
            total = [a if b is None else a + b for a, b in zip(total, found, strict=True)]
    if losses:
        # `backward`, not `grad`: reentrant checkpoints know no other.
        model.zero_grad()
        torch.stack(losses).sum().backward()
        total = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    return total


def assert_alike(found: Any, want: Any) -> None:
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_two_threads_get_what_each_gets_alone(name: str, config: mms.SparseConfig) -> None:
    model, runs = build(name)
    mms.sparsify(model, config)
    with torch.no_grad():
        want = [run(model) for run in runs]
    ready = Barrier(len(runs))

    def work(run: Run) -> list[Tensor]:
        found = []
        with torch.no_grad():
            for _ in range(8):
                ready.wait(120)
                found.append(run(model))
        return found

    with ThreadPoolExecutor(len(runs)) as pool:
        for found, alone in zip(pool.map(work, runs), want, strict=True):
            for out in found:
                assert_alike(out, alone)


@pytest.mark.parametrize("kind", ["none", "reentrant", "not_reentrant"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_two_threads_get_the_gradients_that_each_gets_alone(name: str, kind: str) -> None:
    model, runs = build(name)
    if kind == "reentrant" and name in ("timm", "naflex"):
        pytest.skip("timm checkpoints in one way only")
    mms.sparsify(model, SPARSE)
    set_checkpointing(model, kind)
    parameters = [p for p in model.parameters() if p.requires_grad]

    if kind == "reentrant":
        # Such checkpoints know `backward` only: gradients of both threads meet in the weights.
        want = gradients(model, runs, together=True)
        model.zero_grad()
        ready = Barrier(2)

        def work(run: Run) -> None:
            loss = run(model).square().mean()
            ready.wait(120)
            loss.backward()

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, runs))
        assert_alike([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters], want)
        return

    def run_alone(run: Run) -> list[Tensor]:
        found = torch.autograd.grad(run(model).square().mean(), parameters, allow_unused=True)
        both = zip(parameters, found, strict=True)
        return [torch.zeros_like(p) if grad is None else grad for p, grad in both]

    want = [run_alone(run) for run in runs]
    with ThreadPoolExecutor(2) as pool:
        for found, alone in zip(pool.map(run_alone, runs), want, strict=True):
            assert_alike(found, alone)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", ["reentrant", "not_reentrant"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_images_of_several_sizes_have_right_gradients(
    name: str, kind: str, together: bool
) -> None:
    model, runs = build(name)
    if kind == "reentrant" and (name in ("timm", "naflex") or not together):
        pytest.skip("timm checkpoints in one way only; reentrant ones know `backward` only")
    mms.sparsify(model, SPARSE)
    want = gradients(model, runs)
    set_checkpointing(model, kind)
    for _ in range(2):
        assert_alike(gradients(model, runs, together), want)
    assert_alike(gradients(model, runs[::-1], together), want)


def test_blocks_that_are_checkpointed_by_hand_find_their_image() -> None:
    model, runs = build("timm")
    mms.sparsify(model, SPARSE)
    want = gradients(model, runs)

    def by_hand(image: Tensor, reentrant: bool, size: int) -> Tensor:
        x = model._pos_embed(model.patch_embed(image))
        for start in range(0, len(model.blocks), size):
            part = nn.Sequential(*model.blocks[start : start + size])
            x = checkpoint(part, x, use_reentrant=reentrant)
        return model.forward_head(model.norm(x))

    images = random(2, 3, 64, 96), random(2, 3, 96, 64)
    for reentrant in (False, True):
        for size in (1, 2, 3):
            runs = [lambda m, x=x, r=reentrant, s=size: by_hand(x, r, s) for x in images]
            assert_alike(gradients(model, runs), want)


def test_settings_of_a_block_hold_where_it_is_recomputed_later() -> None:
    model, runs = build("timm")
    mms.sparsify(model, SPARSE)

    def loss(m: Any) -> Tensor:
        with mms.override_config(m, ratio=0.6):
            return runs[0](m)

    want = gradients(model, [loss, runs[1]])
    set_checkpointing(model, "not_reentrant")
    assert_alike(gradients(model, [loss, runs[1]]), want)
    assert mms.sparse_config(model) == SPARSE


def test_settings_hold_in_their_own_thread_only() -> None:
    model, runs = build("timm")
    mms.sparsify(model, SPARSE)
    calls: list[Any] = []
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        want = runs[0](model)
        with mms.override_config(model, ratio=0.6), mms.capture_attention(model, calls.append):
            assert pool.submit(lambda: mms.sparse_config(model).ratio).result() == 0.3
            assert_alike(pool.submit(runs[0], model).result(), want)
            assert not calls
            assert not torch.allclose(runs[0](model), want)
    assert {call.config.ratio for call in calls} == {0.6}


@pytest.mark.parametrize("kind", ["reentrant", "not_reentrant"])
def test_scorers_learn_under_checkpointing_and_each_layer_counts_once(kind: str) -> None:
    case = hf_models.build("llama")
    config = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=0, window=16)
    mms.sparsify(case.model, config, scorer="relevance")
    ids, seen = hf_models.long_ids(200), []

    def scorer_gradients() -> tuple[Tensor, list[Tensor]]:
        case.model.zero_grad()
        for parameter in mms.scorer_parameters(case.model):
            parameter.grad = None
        watch = mms.capture_attention(case.model, lambda call: seen.append(call.name))
        with mms.distillation_losses(case.model) as losses, watch:
            out = case.model(ids, labels=ids, use_cache=False)
        # Behind the block: layers are computed again without it.
        total = out.loss + losses.mean()
        total.backward()
        both = (*mms.scorer_parameters(case.model), *case.model.parameters())
        return total.detach(), [p.grad.clone() for p in both if p.grad is not None]

    case.model.train()
    want = scorer_gradients()
    calls, count = len(seen), len(mms.attention_layers(case.model))
    assert calls == count
    set_checkpointing(case.model, kind)
    assert_alike(scorer_gradients(), want)
    assert len(seen) == 2 * count


def test_a_forward_inside_a_forward_leaves_the_outer_one_as_it_was() -> None:
    model, runs = build("timm")
    mms.sparsify(model, SPARSE)
    with torch.no_grad():
        want = [run(model) for run in runs]
        inner: list[Tensor] = []
        busy: list[bool] = []

        def look(*_: Any) -> None:
            if not busy:
                busy.append(True)
                inner.append(runs[1](model))

        handle = model.pos_drop.register_forward_pre_hook(look)
        # The inner forward is another image through the same tower, between embedding and blocks.
        outer = runs[0](model)
        handle.remove()
    assert_alike(inner[0], want[1])
    assert_alike(outer, want[0])


class Loss(nn.Module):
    """A loss of a model, so that `torch.func` can call it with other weights."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Tensor:
        return self.run(self.model).square().mean()


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", ["timm", "hf_vision", "hf_vlm"])
def test_functional_calls_give_what_the_model_gives(name: str, config: mms.SparseConfig) -> None:
    model, runs = build(name)
    mms.sparsify(model, config)
    loss = Loss(model, runs[0])
    weights = {key: value.detach().requires_grad_() for key, value in loss.named_parameters()}
    options: Any = {"allow_unused": True, "materialize_grads": True}
    want = torch.autograd.grad(loss(), list(loss.parameters()), **options)
    other = torch.func.functional_call(loss, weights, ())
    assert_alike(torch.autograd.grad(other, list(weights.values()), **options), want)
    if config is DENSE:
        call = torch.func.grad(lambda given: torch.func.functional_call(loss, given, ()))
        found = call({key: value.detach() for key, value in weights.items()})
        assert_alike(list(found.values()), list(want))
