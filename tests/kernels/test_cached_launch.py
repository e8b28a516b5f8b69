"""What tells compiled kernels apart is at least what Triton asks for."""

import pytest
import torch
import triton
from hypothesis import given, strategies as st

from mm_sparse.encoders.cuda_graph import CUDAGraphEncoder
from mm_sparse.kernels import cached_launch

pytestmark = pytest.mark.skipif(
    not cached_launch.KNOWN_RELEASE,
    reason=f"Triton {triton.__version__} launches as it always does",
)
NUMBERS = st.one_of(
    st.integers(-(2**31), 2**31), st.integers(-(2**63), 2**64 - 1), st.sampled_from([0, 1, 16, 17])
)


def asked_for(value):
    """Type and specialisation that Triton would compile a kernel for."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    return native_specialize_impl(CUDABackend, value, False, True, True)


@given(NUMBERS, NUMBERS)
def test_numbers_of_one_form_share_a_kernel(one, other):
    if cached_launch.form(one) == cached_launch.form(other):
        assert asked_for(one) == asked_for(other)


def test_tensors_of_one_form_share_a_kernel():
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool]
    tensors = [torch.zeros(64, dtype=kind)[at:] for kind in kinds for at in (0, 1, 2, 4, 8, 16)]
    for one in tensors:
        for other in tensors:
            if cached_launch.form(one) == cached_launch.form(other):
                assert asked_for(one) == asked_for(other)


def test_what_comes_before_the_constants_must_be_all_of_it():
    class Param:
        def __init__(self, name, is_constexpr):
            self.name, self.is_constexpr, self.has_default = name, is_constexpr, False

    class Kernel:
        params = (Param("X", False), Param("count", False), Param("SIZE", True))

    assert cached_launch._tail(Kernel, 2, {"SIZE": 4, "num_warps": 2}) == (4,)
    with pytest.raises(ValueError, match=r"got 1 without .'count'."):
        cached_launch._tail(Kernel, 1, {"SIZE": 4})
    with pytest.raises(ValueError, match="must hold no constants"):
        cached_launch._tail(Kernel, 3, {})


def test_an_encoder_is_captured_on_a_gpu_alone():
    with pytest.raises(ValueError, match=r"inputs\[0\] must be a tensor on a CUDA device, got"):
        CUDAGraphEncoder(torch.nn.Identity(), torch.zeros(1))  # type: ignore[arg-type]
