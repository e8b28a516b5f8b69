"""Sparsified models on a GPU, where the Triton kernels serve them."""

import pytest
import torch

import mm_sparse as mms
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
