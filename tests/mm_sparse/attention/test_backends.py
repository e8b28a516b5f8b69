"""Which devices run what: kernels, gathers in PyTorch, or dense attention."""

import pytest
import torch

import mm_sparse as mms
from mm_sparse.attention import dense_length
from mm_sparse.kernels.ops import supports

DEFAULT = mms.SparseConfig()


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_devices_without_kernels_run_dense_by_default(device: str) -> None:
    there = torch.device(device)
    assert dense_length(DEFAULT, there) > 2**40
    assert dense_length(DEFAULT, torch.device("cpu")) < 10**4
    assert dense_length(DEFAULT, torch.device("cuda")) < 10**5
    # Who asks for sparse attention gets it.
    assert dense_length(mms.SparseConfig(dense_below=5), there) == 5


def test_a_layer_on_such_a_device_runs_dense() -> None:
    transformers = pytest.importorskip("transformers")
    assert transformers
    from tests.support.hf_models import build, long_ids

    model = mms.sparsify(build("llama").model, DEFAULT)
    layer = next(iter(mms.attention_layers(model).values()))
    assert layer.early_mode(10**6, torch.device("cpu"))[0] == "sparse"
    assert layer.early_mode(10**6, torch.device("mps"))[0] == "dense"
    model(long_ids(40))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gathers_run_on_any_device(device: str) -> None:
    q = torch.zeros(1, 2, 64, 16, device=device)
    assert supports(q, q, 64, "torch") is None
    wide = torch.zeros(1, 2, 64, 512, device=device)
    assert supports(wide, wide, 64, "torch") is None


def test_where_no_kernel_runs_the_message_says_what_does() -> None:
    q = torch.zeros(1, 2, 64, 16, device="meta")
    reason = supports(q, q, 64, "auto")
    assert reason is not None
    assert "no kernel runs on meta" in reason
    assert "'torch'" in reason


@pytest.mark.gpu
def test_gathers_on_a_gpu_equal_those_on_a_cpu() -> None:
    config = mms.SparseConfig(0.3, dense_below=0, backend="torch")
    layout = mms.TokenLayout.text(1, 300)
    q, k, v = torch.randn(3, 1, 4, 300, 32).unbind()
    want = mms.sparse_attention(q, k, v, layout=layout, config=config)
    there = [x.cuda() for x in (q, k, v)]
    found = mms.sparse_attention(*there, layout=layout.to("cuda"), config=config)
    torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=1e-4)
