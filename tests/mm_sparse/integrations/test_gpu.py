"""Sparsified models on a GPU, where the Triton kernels serve them."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn

import mm_sparse as mms
from mm_sparse.cuda_graph import capture
from tests.support.hf_models import MODELS, SPARSE, WHOLE, build, long_ids

pytest.importorskip("transformers")
pytestmark = pytest.mark.gpu

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_whole_ratio_equals_stock(name: str, padding: str) -> None:
    case = build(name)
    model = case.model.cuda()
    inputs = {k: v.cuda() for k, v in case.inputs(padding).items()}
    shown = inputs["attention_mask"].bool()
    logits = model(**inputs).logits
    tokens = model.generate(**inputs, **GREEDY)
    mms.sparsify(model, WHOLE)
    found = model(**inputs).logits
    assert all(r.mode == "sparse" or "cross" in r.reason for r in mms.report(model).rows)
    torch.testing.assert_close(found[shown], logits[shown], atol=1e-5, rtol=0)
    assert model.generate(**inputs, **GREEDY).equal(tokens)


def test_sparse_training_agrees_with_the_cpu() -> None:
    ids = long_ids()
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        model = mms.sparsify(build("llama").model, SPARSE, scorer="relevance").to(device).train()
        loss = model(ids.to(device), labels=ids.to(device)).loss
        loss.backward()
        losses.append(loss.detach().cpu())
        gradients.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-4)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 2e-2 * a.norm() + 1e-6


def small_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", dynamic_img_size=True, embed_dim=64, depth=3, num_heads=2
    )
    config = mms.SparseConfig(ratio=0.3, tile=64, unit=16, dense_below=0, sinks=0, window=0)
    return mms.sparsify(model.eval().cuda(), config)


@torch.no_grad()
def test_a_stream_does_not_read_what_another_one_still_makes() -> None:
    images = torch.randn(1, 3, 320, 256, device="cuda")
    want = small_vit()(images)
    model = small_vit()
    torch.cuda.synchronize()
    found = []
    for cycles in (1 << 28, 0):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(cycles)
            found.append(model(images))
    torch.cuda.synchronize()
    for out in found:
        assert torch.equal(out, want)


@torch.no_grad()
def test_threads_with_streams_of_their_own_get_what_each_gets_alone() -> None:
    model = small_vit()
    images = [torch.randn(1, 3, *size, device="cuda") for size in ((320, 256), (256, 320))]
    want = [model(x) for x in images]
    torch.cuda.synchronize()
    ready = Barrier(4)

    def work(x: Tensor) -> list[Tensor]:
        found = []
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                ready.wait(60)
                found.append(model(x).clone())
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(work, images * 2), want * 2, strict=True):
            for out in found:
                assert torch.equal(out, alone)


@torch.no_grad()
def test_a_graph_stays_right_behind_images_of_many_other_sizes() -> None:
    model = small_vit()
    images = torch.randn(1, 3, 320, 256, device="cuda")
    want = model(images).clone()
    replay = capture(lambda: model(images))
    for wide in range(10):
        model(torch.randn(1, 3, 256, 256 + 16 * wide, device="cuda"))
    # Whatever was freed is written over.
    full = [
        torch.full((1 << n,), 77, device="cuda", dtype=torch.int32)
        for n in range(4, 20)
        for _ in range(8)
    ]
    out = replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)
    del full
