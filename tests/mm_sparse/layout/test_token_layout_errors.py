"""What a layout refuses, by name of the argument."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality, TokenLayout
from tests.support.layouts import (
    FEW,
    TEXT,
)

IMG = 900
KINDS = "['text', 'image', 'audio', 'video', 'pad']"
SIDES = "size must be (height, width) of an image or (frames, height, width) of a video"


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([("smell", 3)], f"kind must be one of {KINDS}, got 'smell'"),
        ([(["text"], 3)], f"kind must be one of {KINDS}, got ['text']"),
        ([("text", -1)], "size must be a number of tokens, got -1 (text)"),
        ([("text", 2.5)], "size must be a number of tokens, got 2.5 (text)"),
        ([("text", True)], "size must be a number of tokens, got True (text)"),
        ([("text", (2, 3))], f"{SIDES}, got (2, 3) (text)"),
        ([("image", (2, 3, 4))], f"{SIDES}, got (2, 3, 4) (image)"),
        ([("image", (0, 4))], f"{SIDES}, got (0, 4) (image)"),
        ([("image", (2, 1.5))], f"{SIDES}, got (2, 1.5) (image)"),
        ([("video", (2, 3))], f"{SIDES}, got (2, 3) (video)"),
        ([("video", (2, 3, 0))], f"{SIDES}, got (2, 3, 0) (video)"),
        ([("audio", (2, 3, 4))], f"{SIDES}, got (2, 3, 4) (audio)"),
        (["text"], "spans must be (kind, size) or (kind, size, document), got 'text'"),
        ([("text",)], "spans must be (kind, size) or (kind, size, document), got ('text',)"),
        (
            [("text", 3, 1), ("text", 2, 0)],
            "document must be an int that never falls, got 0 in ('text', 2, 0)",
        ),
        ([("text", 3, -1)], "document must be an int that never falls, got -1 in ('text', 3, -1)"),
        (
            [("text", 3, "a")],
            "document must be an int that never falls, got 'a' in ('text', 3, 'a')",
        ),
    ],
    ids=lambda x: repr(x) if isinstance(x, list) else None,
)
def test_bad_spans_are_refused(spans: list, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenLayout.from_spans(spans)


def test_a_frame_with_a_break_is_refused() -> None:
    message = (
        "video_grids must be of frames without a break, got (2, 2, 1) for the video tokens from 0 "
        "to 2 of row 0"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenLayout.from_input_ids(
            ids([IMG, 5, IMG, IMG, IMG]), video_token_id=IMG, video_grids=[(2, 2, 1)]
        )
    message = "video_grids must follow the rows, got (2, 1, 2) across two rows"
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenLayout.from_input_ids(
            ids([5, IMG, IMG], [IMG, IMG, 5]), video_token_id=IMG, video_grids=[(2, 1, 2)]
        )


def test_an_unknown_padding_side_is_refused() -> None:
    with pytest.raises(ValueError, match='padding_side must be "left" or "right", got \'both\''):
        TokenLayout.from_rows([TEXT], padding_side="both")


EIGHT = torch.tensor([[1, IMG, IMG, IMG, IMG, IMG, IMG, 2]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": EIGHT[0]}, "input_ids must be a (batch, tokens) tensor, got (8,)"),
        ({"input_ids": [[1, 2]]}, "input_ids must be a (batch, tokens) tensor, got [[1, 2]]"),
        ({"input_ids": EIGHT.float()}, "input_ids must be integers, got torch.float32"),
        (
            {"attention_mask": torch.ones(1, 7)},
            "attention_mask must have shape (1, 8), got (1, 7)",
        ),
        ({"attention_mask": [1] * 8}, "attention_mask must have shape (1, 8), got [1, 1"),
        (
            {"document_ids": torch.zeros(8).int()},
            "document_ids must have shape (1, 8), got (8,)",
        ),
        (
            {"document_ids": torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]])},
            "document_ids must not decrease along a row",
        ),
        (
            {"image_grids": [(2, 2)]},
            "image_grids must cover the 6 image tokens, got [(2, 2)] which cover 4",
        ),
        (
            {"image_grids": [(2, 3), (1, 1)]},
            "image_grids must cover the 6 image tokens, got [(2, 3), (1, 1)] which cover 7",
        ),
        (
            {"image_grids": [(0, 4), (2, 3)]},
            "image_grids must be (height, width) of at least 1, got (0, 4)",
        ),
        (
            {"video_grids": [(2, 3)]},
            "video_grids must be (frames, height, width) of at least 1, got (2, 3)",
        ),
        (
            {"video_grids": [(1, 2, 3)]},
            "video_grids must cover the 0 video tokens, got [(1, 2, 3)] which cover 6",
        ),
        (
            {"image_grids": [(2, 3, 1)]},
            "image_grids must be (height, width) of at least 1, got (2, 3, 1)",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_processor_output_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenLayout.from_input_ids(**{"input_ids": EIGHT, "image_token_id": IMG, **given})


def test_a_grid_across_two_rows_is_refused() -> None:
    with pytest.raises(
        ValueError, match=re.escape("image_grids must follow the rows, got (2, 3) across two rows")
    ):
        TokenLayout.from_input_ids(
            ids([1, IMG, IMG], [IMG, IMG, IMG], [IMG, 1, 1]),
            image_token_id=IMG,
            image_grids=[(2, 3)],
        )


def test_a_grid_across_two_pictures_is_refused() -> None:
    message = (
        "image_grids must be of images without a break, got (2, 2) for the image tokens from 0 "
        "to 4 of row 0"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenLayout.from_input_ids(
            ids([IMG, IMG, 5, IMG, IMG]), image_token_id=IMG, image_grids=[(2, 2)]
        )


def good() -> dict[str, Tensor]:
    return {
        "modality": torch.zeros(2, 3, dtype=torch.int8),
        "segment": torch.zeros(2, 3, dtype=torch.int32),
        "document": torch.zeros(2, 3, dtype=torch.int32),
    }


@pytest.mark.parametrize("name", ["modality", "segment", "document"])
def test_tensors_of_a_layout_must_be_integer_matrices_of_one_shape(name: str) -> None:
    fields = good()
    for bad in (torch.zeros(6), None, [[0] * 3] * 2):
        with pytest.raises(ValueError, match=f"{name} must be a \\(batch, tokens\\) tensor, got"):
            TokenLayout(**{**fields, name: bad})
    with pytest.raises(ValueError, match=f"{name} must be integers of shape .* got torch.float32"):
        TokenLayout(**{**fields, name: torch.zeros(2, 3)})
    if name != "modality":
        with pytest.raises(
            ValueError, match=re.escape(f"{name} must be integers of shape (2, 3), got")
        ):
            TokenLayout(**{**fields, name: fields[name][:1]})
        with pytest.raises(ValueError, match=f"{name} must be on cpu, got meta"):
            TokenLayout(**{**fields, name: fields[name].to("meta")})


@pytest.mark.parametrize(
    "span", [torch.zeros(2, 3), torch.zeros(2, 4, 2), [0, 1]], ids=["rank", "tokens", "list"]
)
def test_a_span_of_another_shape_is_refused(span: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("span must have shape (2, 3, 2), got")):
        TokenLayout(**good(), span=span)


@given(st.integers(-3, 6))
@FEW
def test_a_number_that_is_no_modality_is_refused(number: int) -> None:
    modality = torch.tensor([[0, number]])
    if number in list(Modality):
        assert TokenLayout.from_modality(modality).modality.tolist() == [[0, number]]
    else:
        with pytest.raises(ValueError, match=f"modality must hold numbers of .*, got {number}"):
            TokenLayout.from_modality(modality)


@pytest.mark.parametrize(
    ("modality", "message"),
    [
        (torch.zeros(1, 3), "modality must be integers, got torch.float32"),
        (torch.zeros(3).int(), "modality must be a (batch, tokens) tensor, got (3,)"),
        ([[0, 1]], "modality must be a (batch, tokens) tensor, got [[0, 1]]"),
    ],
    ids=["float", "rank", "list"],
)
def test_a_modality_that_is_no_integer_matrix_is_refused(modality: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenLayout.from_modality(modality)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_queries": 71}, "num_queries and query_offset must lie in a layout of 70 tokens"),
        ({"num_queries": -1}, "got -1 and 71"),
        ({"num_queries": 5, "query_offset": 66}, "got 5 and 66"),
        ({"num_queries": 5, "query_offset": -1}, "got 5 and -1"),
        (
            {"num_query_heads": 3, "num_kv_heads": 2},
            "num_query_heads must be a multiple of num_kv_heads, got 3 and 2",
        ),
        ({"num_kv_heads": 0}, "num_query_heads must be a multiple of num_kv_heads, got 1 and 0"),
        ({"num_query_heads": 0}, "num_query_heads must be a multiple of num_kv_heads, got 0 and 1"),
        ({"num_query_heads": 65}, "tile must hold the 65 query heads of a KV head, got 64"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_a_plan_that_does_not_fit_is_refused(given: dict[str, int], message: str) -> None:
    layout, config = TokenLayout.from_spans(TEXT), mms.SparseConfig(tile=64)
    with pytest.raises(ValueError, match=re.escape(message)):
        layout.plan(config, **{"num_query_heads": 1, "num_kv_heads": 1, **given})
