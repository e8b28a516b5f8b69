"""A real engine on a CPU generates what transformers generates; run where vLLM is installed.

Scheduler, pages, prefixes in cache, preemption and batches are the engine's; see
`tests/support/vllm_engine.py` for what stands in for kernels of GPUs.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mm_sparse as mms

ROOT = Path(__file__).resolve().parents[4]
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="needs vLLM 0.26.0 in an environment of its own (docs/how-to/serve.md)",
    ),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]
NEW = 16
LENGTHS = (300, 77, 200)
FIELDS = {"sinks": 16, "window": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small model with random weights, and the folder that it is in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=128, max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"], initializer_range=0.2,
    )  # fmt: skip
    found = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("model")
    found.save_pretrained(folder)
    return found, folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 128, (n,), generator=generator).tolist() for n in LENGTHS]


def by_transformers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    outs = [
        model.generate(
            torch.tensor([x]), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )
        for x in prompts
    ]  # fmt: skip
    return [out[0, len(x) :].tolist() for out, x in zip(outs, prompts, strict=True)]


def by_engine(
    folder: Path,
    rounds: list[list[list[int]]],
    section: dict | None,
    environment: dict | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What the engine generates in each round, in a process of its own."""
    options = {
        "max_model_len": 384, "block_size": 32, "kv_cache_memory_bytes": 1 << 25,
        "disable_log_stats": False, **options,
    }  # fmt: skip
    if section is not None:
        options["additional_config"] = {"mm_sparse": section}
    asked = {"model": str(folder), "rounds": rounds, "new": NEW, "options": options}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.vllm_engine", json.dumps(asked)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **(environment or {})},
    )  # fmt: skip
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def test_with_all_keys_tokens_are_those_of_dense_attention(model: Any, prompts: Any) -> None:
    """Chunks of prompts, mixed batches with dense requests, and prefixes that are in cache."""
    network, folder = model
    found = by_engine(
        folder, [prompts, prompts], {"ratio": 1.0, "config": {"dense_below": 150, **FIELDS}},
        max_num_batched_tokens=128,
    )  # fmt: skip
    want = by_transformers(network, prompts)
    assert found["tokens"] == [want, want]
    assert found["cached"][0] == [0, 0, 0]
    assert all(count >= 64 for count in found["cached"][1])
    assert found["dense_calls"]


def test_preempted_requests_generate_the_same(model: Any, prompts: Any) -> None:
    """Two requests of ten pages that need eleven each: one loses its own, and computes anew."""
    network, folder = model
    many = [prompts[0] + prompts[1][:12], prompts[0][::-1] + prompts[2][:12]]
    page = 2 * 32 * 2 * 64 * 4
    found = by_engine(
        folder, [many], {"ratio": 1.0, "config": {"dense_below": 0, **FIELDS}},
        kv_cache_memory_bytes=22 * page, enable_prefix_caching=False,
    )  # fmt: skip
    assert found["preempted"] > 0
    assert found["tokens"] == [by_transformers(network, many)]
    assert found["dense_calls"] == []


def test_sparse_tokens_are_those_of_the_sparsified_model(
    model: Any, prompts: Any, tmp_path: Path
) -> None:
    """Scorers and budgets come from a folder that the environment names."""
    network, folder = model
    dense = by_transformers(network, prompts)
    config = mms.SparseConfig(
        ratio=0.2, dense_below=0, bidirectional=(), layer_ratio={1: (0.15, 0.3)}, **FIELDS
    )
    mms.sparsify(network, config, scorer="fine")
    try:
        torch.manual_seed(2)
        for parameter in mms.scorer_parameters(network):
            torch.nn.init.normal_(parameter, std=0.05)
        mms.save_scorers(network, tmp_path)
        want = by_transformers(network, prompts)
    finally:
        mms.densify(network)
    assert want != dense
    found = by_engine(
        folder, [prompts], None, {"MM_SPARSE_SCORERS": str(tmp_path)}, max_num_batched_tokens=1024
    )
    assert found["tokens"] == [want]
    assert found["dense_calls"] == []
