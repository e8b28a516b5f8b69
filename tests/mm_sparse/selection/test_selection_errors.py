"""What a selection refuses, by name of the argument."""

import dataclasses
import re

import pytest
import torch

import mm_sparse as mms
from mm_sparse import Scores, Selection, TokenLayout
from tests.support.layouts import (
    TEXT,
)
from tests.support.selections import keep, one_row, random_scores


def good_selection() -> Selection:
    return keep(([[("text", 256)]], "right"), one_row(TEXT, ratio=0.5, tokens=64))[0]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((0, 0, 3, 0), 16, "index must hold unit ids in [0, 16) up to count"),
        ((0, 0, 3, 1), -1, "index must hold unit ids in [0, 16) up to count"),
        ((0, 0, 3, 1), 0, "index must ascend within each list"),
    ],
    ids=["too-large", "negative", "twice"],
)
def test_lists_that_are_not_ascending_units_are_refused(
    place: tuple[int, ...], value: int, message: str
) -> None:
    selection = good_selection()
    index = selection.index.clone()
    index[place[:3]] = torch.arange(index.shape[-1], dtype=torch.int32)
    index[place] = value
    count = torch.full_like(selection.count, 3)
    index[..., 3:] = -1
    index[:, :, :3] = torch.arange(index.shape[-1], dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape(message)):
        Selection(index, count, selection.plan).check()


@pytest.mark.parametrize("count", [-1, 99])
def test_counts_that_the_lists_do_not_hold_are_refused(count: int) -> None:
    selection = good_selection()
    length = selection.index.shape[-1]
    index = torch.arange(length, dtype=torch.int32).expand_as(selection.index)
    wrong = selection.count.clone()
    wrong[0, 0, 1] = count
    with pytest.raises(ValueError, match=re.escape(f"count must be in [0, {length}]")):
        Selection(index, wrong, selection.plan).check()


def test_what_stands_behind_count_is_not_read() -> None:
    selection = good_selection()
    slot = torch.arange(selection.index.shape[-1])
    junk = selection.index.int().masked_fill(slot >= selection.count[..., None], 10**6)
    other = Selection(junk, selection.count, selection.plan).check()
    assert torch.equal(other.to_dense_mask(), selection.to_dense_mask())
    assert other.density() == selection.density()


def test_tensors_that_are_no_lists_of_the_plan_are_refused() -> None:
    selection = good_selection()
    index, count, plan = selection.index, selection.count, selection.plan
    tiles = plan.tiles.shape[1]
    for args, message in (
        ((index.long(), count), "index must be int16 or int32 with 4 dimensions, got torch.int64"),
        ((index[0], count), "index must be int16 or int32 with 4 dimensions, got torch.int16"),
        ((index, count[..., None]), "count must be int32 with 3 dimensions, got torch.int32"),
        ((index, count.float()), "count must be int32 with 3 dimensions, got torch.float32"),
        ((index[:, :, 1:], count), f"index must have 1 rows and {tiles} tiles as the plan has"),
        ((index, count.repeat(2, 1, 1)), f"count must have 1 rows and {tiles} tiles as the plan"),
        ((index, count.repeat(1, 2, 1)), "count must have index's 1 heads, got 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Selection(*args, plan)
    with pytest.raises(TypeError, match="index must be a tensor, got list"):
        Selection([[1]], count, plan)  # type: ignore[arg-type]


def test_a_mask_that_is_none_of_units_is_refused() -> None:
    plan = good_selection().plan
    tiles = plan.tiles.shape[1]
    message = "kept must be bool (batch, KV heads, tiles, 16), got"
    for bad in (
        torch.ones(1, 1, tiles, 16),
        torch.ones(1, tiles, 16).bool(),
        torch.ones(1, 1, tiles, 15).bool(),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Selection.from_mask(bad, plan)


def test_scores_of_another_layout_or_config_are_refused() -> None:
    layout, config = TokenLayout.text(1, 256), one_row(TEXT)
    scores = random_scores(layout, config)
    with pytest.raises(ValueError, match="layout must be the one that scores were computed for"):
        mms.select(scores, TokenLayout.text(1, 256), config)
    other = dataclasses.replace(config, ratio=0.5)
    message = f"config must be the one that scores were computed for, {config}, got {other}"
    with pytest.raises(ValueError, match=re.escape(message)):
        mms.select(scores, layout, other)


@pytest.mark.parametrize(
    "shape", [(2, 1, 4, 16), (1, 1, 3, 16), (1, 1, 4, 17)], ids=["batch", "tiles", "units"]
)
def test_scores_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    layout, config = TokenLayout.text(1, 256), one_row(TEXT)
    plan = random_scores(layout, config).plan
    message = f"scores must be (batch, KV heads, tiles, units) = (1, *, 4, 16), got {shape}"
    for scores in (torch.zeros(shape), Scores(torch.zeros(shape), plan)):
        with pytest.raises(ValueError, match=re.escape(message)):
            mms.select(scores, layout, config)


def test_values_that_are_no_scores_are_refused() -> None:
    layout, config = TokenLayout.text(1, 256), one_row(TEXT)
    message = "scores must be (batch, KV heads, tiles, units), got (4, 16)"
    with pytest.raises(ValueError, match=re.escape(message)):
        mms.select(torch.zeros(4, 16), layout, config)
    with pytest.raises(TypeError, match="scores must be Scores or a tensor, got list"):
        mms.select([[0.0]], layout, config)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scores must be on cpu as layout is, got meta"):
        mms.select(torch.zeros(1, 1, 4, 16, device="meta"), layout, config)
    with pytest.raises(ValueError, match="num_query_heads must be a multiple of num_kv_heads"):
        mms.select(torch.zeros(1, 2, 4, 16), layout, config, num_query_heads=3)
