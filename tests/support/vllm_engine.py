"""A real engine of vLLM on a CPU, for which its wheel for GPUs has no kernels.

Of the engine all that plans, allocates and batches runs as it is: scheduler, pages, prefixes in
cache, preemption, chunks of prompts, model runner, metadata. Plain PyTorch stands in for the
kernels of the wheel: writing to pages, and FlashAttention for what is dense.

`python -m tests.support.vllm_engine '{"model": ..., "prompts": [...], ...}'` prints JSON.
"""

# vLLM is no dependency of this package.
# pyright: reportMissingImports=false
import json
import os
import sys
from typing import Any

import torch
from torch import Tensor


def write_pages(self: Any, layer: Any, key: Tensor, value: Tensor, pages: Tensor, slots: Tensor):
    """What `reshape_and_cache_flash` does."""
    slots = slots[: len(key)]
    real = slots >= 0
    place, size = slots[real], pages.shape[2]
    both = torch.cat([key, value], -1)[: len(slots)][real]
    pages[place // size, :, place % size] = both


def dense_attention(
    self: Any, layer: Any, query: Tensor, key: Tensor, value: Tensor, pages: Tensor, step: Any,
    output: Tensor, *_: Any,
) -> Tensor:  # fmt: skip
    """Causal attention of every request, of what FlashAttention is told of the step."""
    if step is None:
        return output.fill_(0)
    CALLS.append(step.query_start_loc.diff().tolist())
    starts = step.query_start_loc.tolist()
    for i, length in enumerate(step.seq_lens.tolist()):
        queries = starts[i + 1] - starts[i]
        if not queries:
            continue
        own = pages[step.block_table[i].long()].transpose(1, 2).flatten(0, 1)[:length]
        k, v = own.transpose(0, 1).split(self.head_size, -1)
        q = query[starts[i] : starts[i + 1]].transpose(0, 1)
        seen = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
        out = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, scale=self.scale, enable_gqa=True
        )
        output[starts[i] : starts[i + 1]] = out[0].transpose(0, 1)
    return output


CALLS: list[list[int]] = []
"""Queries of the requests of each dense call."""


def find_slots(starts: Tensor, positions: Tensor, table: Tensor, slots: Tensor, size: int) -> None:
    """Where the engine's table of pages puts tokens."""
    slots[len(positions) :] = -1
    for i in range(len(starts) - 1):
        own = slice(int(starts[i]), int(starts[i + 1]))
        place = positions[own]
        slots[own] = table[i][place // size].long() * size + place % size


def on_cpu() -> None:
    """Have vLLM take this CPU for its device, and plain PyTorch for the wheel's kernels."""
    import vllm.platforms as platforms
    import vllm.utils.torch_utils as torch_utils
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import DeviceCapability

    class Platform(CpuPlatform):
        @classmethod
        def get_attn_backend_cls(cls, backend: Any, config: Any, num_heads: Any = None) -> str:
            raise NotImplementedError

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            super().check_and_update_config(vllm_config)
            vllm_config.parallel_config.distributed_executor_backend = "uni"
            vllm_config.parallel_config.worker_cls = f"{__name__}.worker_class"

    def select(backend: Any, attn_selector_config: Any, num_heads: Any = None) -> str:
        # As for CUDA devices: the backend that was asked for, or an error.
        reasons = backend.get_class().validate_configuration(
            device_capability=DeviceCapability(9, 0), **attn_selector_config._asdict()
        )
        # Numbers in float32 tell rounding from mistakes.
        reasons = [reason for reason in reasons if reason != "dtype not supported"]
        if reasons:
            raise ValueError(f"Selected backend {backend} is not valid: {reasons}")
        return backend.get_path()

    Platform.get_attn_backend_cls = staticmethod(select)  # type: ignore[method-assign]
    platforms._current_platform = Platform()
    torch_utils.PIN_MEMORY = False


def use_stand_ins() -> None:
    """Replace the kernels that the wheel lacks on a CPU."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    for name in ("silu_and_mul", "rms_norm", "fused_add_rms_norm", "rotary_embedding"):
        # Layers look them up, and then run what is written in PyTorch.
        setattr(torch.ops._C, name, None)
    torch.ops._C.init_cpu_memory_env = lambda *_: ""
    torch.ops._C.compute_slot_mapping_kernel_impl = find_slots
    FlashAttentionImpl.do_kv_cache_update = write_pages
    FlashAttentionImpl.forward = dense_attention


def worker_class(*args: Any, **kwargs: Any) -> Any:
    """The engine's worker for CPUs."""
    use_stand_ins()
    from vllm.v1.worker.cpu_worker import CPUWorker

    return CPUWorker(*args, **kwargs)


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily for prompts, in rounds.

    Args:
        asked: `model` folder, `rounds` lists of prompts of token ids, `new` tokens, `options` of
            the engine.
    """
    on_cpu()
    # The engine loads plug-ins by the entry point of an installed package; this may be a clone.
    from mm_sparse.integrations.vllm import register

    register()
    use_stand_ins()
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=asked["model"], skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
        max_num_seqs=8, compilation_config={"custom_ops": ["none"]},
        **{"attention_backend": "CUSTOM", **asked["options"]},
    )  # fmt: skip
    params = SamplingParams(
        temperature=0, max_tokens=asked["new"], ignore_eos=True, detokenize=False
    )
    found, cached = [], []
    for prompts in asked["rounds"]:
        outs = engine.generate([{"prompt_token_ids": x} for x in prompts], params, use_tqdm=False)
        found.append([list(out.outputs[0].token_ids) for out in outs])
        cached.append([out.num_cached_tokens for out in outs])
    metrics = {m.name: m.value for m in engine.get_metrics() if hasattr(m, "value")}
    return {
        "tokens": found, "cached": cached, "dense_calls": CALLS,
        "preempted": metrics.get("vllm:num_preemptions", 0),
    }  # fmt: skip


if __name__ == "__main__":
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    print("RESULT " + json.dumps(main(json.loads(sys.argv[1]))))
