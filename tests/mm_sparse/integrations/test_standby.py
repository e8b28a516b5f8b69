"""Layers whose calls cannot be long enough to run sparse are left as they were, until they can."""

import copy
import pickle
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mm_sparse as mms

pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

# Sparse from 40 tokens on: towers below are made for fewer.
CONFIG = mms.SparseConfig(ratio=0.3, dense_below=40, sinks=0, window=0, tile=64)
WIDTH: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def clip(**changes: Any) -> Any:
    """A CLIP tower for 16 patches, and a class token."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(**WIDTH, image_size=16, patch_size=4, **changes)
    return CLIPVisionModel(config).eval()


def gpt2() -> Any:
    """A language model with 24 positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": None}
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=24,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **ids,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def vit(**changes: Any) -> Any:
    """A timm tower for 16 patches, and a class token."""
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", **size, **changes).eval()


def pixels(side: int = 16) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def modes(model: nn.Module) -> set[str]:
    return {row.mode for row in mms.report(model).rows}


def is_as_it_was(model: nn.Module) -> bool:
    """Whether no module asks a layer."""
    stock = all(
        m.config._attn_implementation == "sdpa" for m in model.modules() if hasattr(m, "config")
    )
    # Blocks of timm are called by way of something else, once a forward.
    parts = [m for m in model.modules() if type(m) is not nn.Sequential]
    return stock and not any("forward" in vars(m) for m in parts)


@pytest.mark.parametrize("make", [clip, vit])
@torch.no_grad()
def test_short_towers_are_not_wrapped(make: Any) -> None:
    model, x = make(), pixels()
    attributes = {name: set(vars(m)) for name, m in model.named_modules() if "attn" in name}
    stock = model(x)
    mms.sparsify(model, CONFIG)
    assert is_as_it_was(model)
    found = model(x)
    assert torch.equal(*(getattr(y, "pooler_output", y) for y in (found, stock)))
    rows = mms.report(model).rows
    assert {row.mode for row in rows} == {"dense"}
    assert {row.reason for row in rows} == {"never reaches dense_below (40): 17 tokens at most"}
    mms.densify(model)
    now = {name: set(vars(m)) for name, m in model.named_modules() if "attn" in name}
    assert now == attributes


def test_layers_that_can_reach_it_are_wrapped() -> None:
    for config in (replace(CONFIG, dense_below=17), mms.SparseConfig(dense_below=0)):
        model = mms.sparsify(clip(), config)
        assert not is_as_it_was(model)
        assert modes(model) == {"sparse"}


@torch.no_grad()
def test_a_larger_image_runs_sparse() -> None:
    for model, more in (
        (clip(), {"interpolate_pos_encoding": True}),
        (vit(dynamic_img_size=True), {}),
    ):
        mms.sparsify(model, CONFIG)
        model(pixels())
        assert is_as_it_was(model)
        found = model(pixels(48), **more)
        assert modes(model) == {"sparse"}
        wrapped = mms.sparsify(copy.deepcopy(model), replace(CONFIG, dense_below=0))
        again = wrapped(pixels(48), **more)
        assert torch.equal(*(getattr(y, "pooler_output", y) for y in (found, again)))
        # It may come again: they stay wrapped, and short images run dense.
        model(pixels())
        assert modes(model) == {"dense"}
        mms.densify(model)
        assert is_as_it_was(model)


@pytest.mark.parametrize("make", [clip, vit])
@torch.no_grad()
def test_settings_of_a_block_reach_them(make: Any) -> None:
    model, x = mms.sparsify(make(), CONFIG), pixels()
    seen: list[mms.AttentionCall] = []
    with mms.override_config(model, dense_below=0):
        assert not is_as_it_was(model)
        model(x)
        assert modes(model) == {"sparse"}
        with mms.capture_attention(model, seen.append):
            model(x)
    assert [call.sparse for call in seen] == [True, True]
    assert is_as_it_was(model)
    with mms.capture_attention(model, seen.append):
        model(x)
    assert [call.sparse for call in seen[2:]] == [False, False]
    assert mms.report(model, _inputs(make)).rows[0].seconds
    assert is_as_it_was(model)
    with pytest.raises(RuntimeError, match="on purpose"), mms.override_config(model, ratio=0.5):
        raise RuntimeError("on purpose")
    assert is_as_it_was(model)


def _inputs(make: Any) -> dict[str, Tensor]:
    return {"pixel_values" if make is clip else "x": pixels()}


@pytest.mark.parametrize("make", [clip, vit])
@torch.no_grad()
def test_settings_of_a_block_reach_them_in_a_compiled_model(make: Any) -> None:
    model, x = make(), pixels()
    stock = model(x)
    mms.sparsify(model, CONFIG)
    with mms.override_config(model, dense_below=0):
        sparse = model(x)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        for changed, wanted in ((False, stock), (True, sparse)):
            with mms.override_config(model, dense_below=0) if changed else nullcontext():
                found = compiled(x)
            pair = (getattr(y, "pooler_output", y) for y in (found, wanted))
            torch.testing.assert_close(*pair)
        assert is_as_it_was(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_a_block_of_other_settings_again_as_it_was(reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = mms.sparsify(clip(), CONFIG)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        x = pixels().requires_grad_()
        with mms.override_config(model, dense_below=0):
            loss = model(x).pooler_output.square().sum()
        loss.backward()
        grads.append(model.encoder.layers[0].self_attn.q_proj.weight.grad)
        del loss, x
        with mms.override_config(model, dense_below=0):
            pass
        assert is_as_it_was(model)
    torch.testing.assert_close(*grads)


@torch.no_grad()
def test_rows_longer_than_a_table_of_positions_run_sparse() -> None:
    model = mms.sparsify(gpt2(), CONFIG)
    ids = torch.randint(0, 50, (1, 48))
    model(ids[:, :24])
    assert is_as_it_was(model)
    assert {row.reason for row in mms.report(model).rows} == {
        "never reaches dense_below (40): 24 tokens at most"
    }
    places = (torch.arange(48) % 24)[None]
    model(ids, position_ids=places)
    assert modes(model) == {"sparse"}


@torch.no_grad()
def test_a_cache_grows_until_layers_run_sparse() -> None:
    model = mms.sparsify(gpt2(), CONFIG)
    ids = torch.randint(0, 50, (1, 20))
    cache = None
    for _ in range(2):
        assert is_as_it_was(model)
        cache = model(
            ids, past_key_values=cache, position_ids=torch.arange(20)[None]
        ).past_key_values
    # 40 keys: as many as the table has not.
    assert modes(model) == {"sparse"}


@torch.no_grad()
def test_generated_tokens_are_those_of_the_stock_model() -> None:
    model, ids = gpt2(), torch.randint(0, 50, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    run = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(ids, **run)
    assert torch.equal(mms.sparsify(model, CONFIG).generate(ids, **run), stock)
    assert is_as_it_was(model)


def test_models_with_one_config_wait_for_each_other() -> None:
    from transformers import CLIPVisionModel

    first = clip()
    second = CLIPVisionModel(first.config).eval()
    mms.sparsify(first, CONFIG)
    with mms.override_config(first, dense_below=0):
        mms.sparsify(second, CONFIG)
        with mms.override_config(second, dense_below=0):
            pass
        first(pixels())
        assert modes(first) == {"sparse"}
    assert is_as_it_was(first)
    assert is_as_it_was(second)


@pytest.mark.parametrize("make", [clip, vit])
@torch.no_grad()
def test_copies_wait_on_their_own(make: Any) -> None:
    model = mms.sparsify(make(), CONFIG, scorer="relevance")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with mms.override_config(twin, dense_below=0):
            assert is_as_it_was(model)
            twin(pixels())
            assert modes(twin) == {"sparse"}
        assert is_as_it_was(twin)
        assert list(mms.scorers_of(twin)) == list(mms.scorers_of(model))


def test_scorers_learn() -> None:
    model = mms.sparsify(clip(), CONFIG, scorer="relevance")
    with mms.override_config(model, dense_below=0), mms.distillation_losses(model) as losses:
        model(pixels())
    losses.mean().backward()
    assert all(p.grad is not None for p in mms.scorer_parameters(model) if p.requires_grad)


def test_layers_of_one_config_are_wrapped_together() -> None:
    """A decoder of any length next to one of few positions."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_source_positions=30,
        max_target_positions=20, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    assert is_as_it_was(mms.sparsify(model, CONFIG))
    # Now the encoder reaches it, and all of the model names one config.
    assert not is_as_it_was(mms.sparsify(model, replace(CONFIG, dense_below=25)))
    rows = mms.report(model).rows
    assert {row.mode for row in rows if ".encoder." in row.name} == {"sparse"}


@torch.no_grad()
def test_ranks_that_share_sequences_have_them_wrapped(tmp_path: Any) -> None:
    import torch.distributed as dist
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {**WIDTH, "word_embed_proj_dim": 32, "ffn_dim": 32, "max_position_embeddings": 24}
    sizes.pop("intermediate_size")
    model = mms.sparsify(OPTForCausalLM(OPTConfig(**sizes, vocab_size=50)).eval(), CONFIG)
    assert is_as_it_was(model)
    ids = torch.randint(0, 50, (1, 16))
    stock = model(ids).logits
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with mms.sequence_parallel(model):
            assert not is_as_it_was(model)
            torch.testing.assert_close(model(ids).logits, stock)
    finally:
        dist.destroy_process_group()
