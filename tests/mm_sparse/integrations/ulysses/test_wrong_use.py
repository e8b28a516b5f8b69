"""What `sequence_parallel` refuses, by name; with a process group that sends nothing."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import mm_sparse as mms
from tests.support import hf_models
from tests.support.hf_models import SPARSE

IDS = torch.randint(3, 99, (1, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def group():
    """Rank 0 of two that do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def model():
    return mms.sparsify(hf_models.llama().model, SPARSE, scorer="relevance")


def shared(model, **inputs):
    return model(**{"input_ids": IDS, **inputs})


def test_a_group_is_needed(model):
    with pytest.raises(ValueError, match="group must be a process group, got None"):
        mms.sequence_parallel(model)


def test_another_group_is_refused(model, group):
    with pytest.raises(TypeError, match="group must be a ProcessGroup, got int"):
        mms.sequence_parallel(model, 2)


def test_a_model_that_is_not_sparsified_is_refused(group):
    with pytest.raises(ValueError, match="model must be sparsified"):
        mms.sequence_parallel(hf_models.llama().model)


def test_a_model_without_a_decoder_is_refused(group):
    tower = mms.sparsify(hf_models.qwen2_5_vl().model.model.visual, SPARSE)
    with pytest.raises(ValueError, match="model must have a decoder"):
        mms.sequence_parallel(tower)


def test_heads_that_ranks_do_not_divide_are_refused(group):
    model = hf_models.llama(num_attention_heads=6, num_key_value_heads=3, hidden_size=48).model
    mms.sparsify(model, SPARSE)
    with pytest.raises(ValueError, match=r"layers\.0.*3 KV heads and 2 ranks do not divide"):
        mms.sequence_parallel(model)
    assert all(layer.head_split is None for layer in mms.attention_layers(model).values())


def test_a_batch_that_ranks_do_not_divide_is_refused(model, group):
    with (
        mms.sequence_parallel(model),
        pytest.raises(ValueError, match="multiple of 2 ranks, got 63"),
    ):
        model(input_ids=IDS[:, :63])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": IDS}, "labels must not go to the forward"),
        ({"use_cache": True}, "use_cache must be False"),
    ],
)
def test_arguments_that_need_all_tokens_are_refused(model, group, inputs, message):
    with mms.sequence_parallel(model), pytest.raises(ValueError, match=message):
        shared(model, **inputs)


def test_a_cache_is_refused_while_gradients_are_computed(model, group):
    from transformers import DynamicCache

    with (
        mms.sequence_parallel(model),
        pytest.raises(ValueError, match="past_key_values must be None"),
    ):
        shared(model, past_key_values=DynamicCache(config=model.config))


def test_no_cache_is_made_where_nobody_asks_for_one(model, group):
    with mms.sequence_parallel(model):
        assert shared(model).past_key_values is None
    assert shared(model).past_key_values is not None


def test_logits_of_other_tokens_are_refused(model, group):
    with (
        mms.sequence_parallel(model) as sequence,
        pytest.raises(ValueError, match=r"logits must be of the \(1, 32\) tokens"),
    ):
        sequence.loss(torch.zeros(1, 64, 9), IDS)


def test_sampled_keys_are_refused(group):
    model = mms.sparsify(hf_models.llama().model, replace(SPARSE, sample_ratio=0.5))
    with mms.sequence_parallel(model), pytest.raises(ValueError, match="sample_ratio must be 0"):
        shared(model)


def test_a_mask_of_some_tokens_is_refused(model, group):
    with (
        mms.sequence_parallel(model),
        pytest.raises(ValueError, match=r"a mask of all 64 tokens of 2 ranks"),
    ):
        shared(model, attention_mask=torch.ones(1, 1, 32, 32, dtype=torch.bool))


def test_scorers_that_do_not_say_where_heads_are_are_refused(group):
    class Weighted(mms.PooledScorer):
        def __init__(self, *, num_query_heads, num_kv_heads, head_dim):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(num_kv_heads))

    model = mms.sparsify(hf_models.llama().model, SPARSE, scorer=Weighted)
    with pytest.raises(ValueError, match="Weighted does not for 'weight'"):
        mms.sequence_parallel(model)


def test_blocks_that_mix_tokens_otherwise_are_refused(model, group):
    model.model.layers[1].mlp.conv = nn.Conv1d(4, 4, 3)
    with pytest.raises(ValueError, match=r"model\.layers\.1 .*by attention alone, got mlp\.conv"):
        mms.sequence_parallel(model)


def test_several_decoders_are_refused(group):
    pair = nn.ModuleDict({"a": hf_models.llama().model, "b": hf_models.llama().model})
    mms.sparsify(pair, SPARSE)
    with pytest.raises(ValueError, match="one list of blocks"):
        mms.sequence_parallel(pair)


def test_twice_is_refused(model, group):
    with (
        mms.sequence_parallel(model),
        pytest.raises(ValueError, match="it is split already"),
    ):
        mms.sequence_parallel(model)


@pytest.mark.parametrize("how", ["remove", "densify", "sparsify"])
def test_a_model_takes_whole_sequences_again(model, group, how):
    with torch.no_grad():
        whole = shared(model).logits
        sequence = mms.sequence_parallel(model)
        assert shared(model).logits.shape[1] == 32
        if how == "remove":
            sequence.remove()
        elif how == "densify":
            mms.densify(model)
        else:
            mms.sparsify(model, SPARSE)
        logits = shared(model).logits
        assert logits.shape == whole.shape
        if how != "densify":
            torch.testing.assert_close(logits, whole, rtol=0, atol=0)
        sequence.remove()


def test_padding_needs_tokens(model, group):
    with mms.sequence_parallel(model) as sequence:
        with pytest.raises(ValueError, match="batch must have input_ids or inputs_embeds"):
            sequence.pad({"labels": IDS})
        with pytest.raises(ValueError, match="labels must have one entry for each of 63 tokens"):
            sequence.pad({"input_ids": IDS[:, :63], "labels": IDS})


def test_padding_hides_what_it_adds(model, group):
    with mms.sequence_parallel(model) as sequence:
        batch = sequence.pad(
            {"input_ids": IDS[:, :61], "labels": IDS[:, :61]}, multiple=4, pad_token_id=7
        )
    assert batch["input_ids"].shape == (1, 64)
    assert batch["input_ids"][0, 61:].tolist() == [7, 7, 7]
    assert batch["attention_mask"][0].tolist() == [1] * 61 + [0] * 3
    assert batch["labels"][0, 61:].tolist() == [-100] * 3


def test_caches_that_do_not_grow_are_refused_and_the_cache_is_as_it_was(model, group):
    from transformers import DynamicCache, StaticCache

    caches = [
        (StaticCache(model.config, max_cache_len=96), "got StaticCache"),
        (mms.SparseCache(model, keep=0.5), "got SparseCache"),
    ]
    with mms.sequence_parallel(model), torch.no_grad():
        for cache, said in caches:
            with pytest.raises(ValueError, match=f"must be a cache that grows.*{said}"):
                shared(model, past_key_values=cache, use_cache=True)
        grows = DynamicCache(config=model.config)
        with pytest.raises(ValueError, match="output_hidden_states must be False"):
            shared(model, past_key_values=grows, use_cache=True, output_hidden_states=True)
    assert "update" not in vars(grows)
