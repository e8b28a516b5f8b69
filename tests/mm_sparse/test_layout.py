"""Which token is what, and what it sees, against a definition that goes token by token."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality, TokenLayout
from tests.mm_sparse.layouts import (
    FEW,
    HOLE,
    KINDS,
    MIXED,
    TEXT,
    Row,
    batches,
    configs,
    seen_batch,
    tokens_of,
)

IMG, AUD = 900, 901


def pairs_of(layout: TokenLayout, config: mms.SparseConfig) -> Tensor:
    """(B, M, M) bool from the layout's ranges of keys."""
    low, high = layout.visible_span(config.causal, config.bidirectional).unbind(-1)
    key = torch.arange(layout.length)
    return (key >= low[..., None]) & (key < high[..., None]) & layout.valid[:, None]


def runs(label: Tensor) -> list[int]:
    """Lengths of the runs of equal values."""
    return torch.unique_consecutive(label, return_counts=True)[1].tolist()


@given(batches(), configs())
@FEW
def test_each_token_sees_its_document_up_to_itself_or_its_whole_segment(
    batch: tuple[list[Row], str], config: mms.SparseConfig
) -> None:
    rows, side = batch
    layout = TokenLayout.from_rows(rows, padding_side=side)
    assert torch.equal(pairs_of(layout, config), seen_batch(rows, side, config))


@given(batches())
@FEW
def test_rows_that_differ_are_padded_on_the_side_asked_for(batch: tuple[list[Row], str]) -> None:
    rows, side = batch
    layout = TokenLayout.from_rows(rows, padding_side=side)
    assert layout.batch == len(rows)
    assert layout.length == max(len(tokens_of(row)) for row in rows)
    for b, row in enumerate(rows):
        tokens = tokens_of(row)
        at = slice(layout.length - len(tokens), None) if side == "left" else slice(len(tokens))
        assert layout.document[b, at].tolist() == [t[2] for t in tokens]
        want = [KINDS.get(t[0], 0) for t in tokens]
        assert layout.modality[b, at].tolist() == want
        assert layout.segment[b, at].tolist() == [t[1] for t in tokens]
        rest = torch.ones(layout.length, dtype=torch.bool)
        rest[at] = False
        assert not layout.valid[b, rest].any()


def test_spans_become_modalities_segments_and_grids() -> None:
    layout = TokenLayout.from_spans(MIXED, batch=3)
    assert (layout.batch, layout.length) == (3, 21 + 63 + 33 + 50 + 5)
    assert layout.valid.all()
    assert runs(layout.segment[2]) == [21, 63, 33, 50, 5]
    assert [int(layout.modality[0, i]) for i in (0, 21, 84, 117, 167)] == [0, 1, 0, 2, 0]
    assert layout.grids == ({1: (7, 9)},) * 3
    assert layout.modality.dtype == torch.int8
    assert layout.segment.dtype == layout.document.dtype == torch.int32


def test_text_is_one_segment_and_one_document() -> None:
    layout = TokenLayout.text(2, 5)
    assert (layout.batch, layout.length) == (2, 5)
    assert (layout.modality == int(Modality.TEXT)).all()
    assert runs(layout.segment[0]) == runs(layout.document[0]) == [5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_the_numbers_that_grids_refer_to(side: str) -> None:
    layout = TokenLayout.from_rows([[("text", 2), ("image", (2, 3))], TEXT], padding_side=side)
    (number, grid), *more = layout.grids[0].items()
    assert grid == (2, 3)
    assert not more
    own = layout.segment[0] == number
    assert int(own.sum()) == 6
    assert (layout.modality[0, own] == int(Modality.IMAGE)).all()
    assert layout.grids[1] == {}


def test_a_hole_of_padding_does_not_part_a_document() -> None:
    layout = TokenLayout.from_spans(HOLE)
    low, high = layout.visible_span(causal=True)[0].unbind(-1)
    last = layout.length - 1
    assert (int(low[last]), int(high[last])) == (0, layout.length)
    assert (high[~layout.valid[0]] == 0).all()


def test_what_a_token_sees_does_not_depend_on_padding_behind_it() -> None:
    row = [("text", 20, 0), ("image", 5, 1)]
    alone = TokenLayout.from_spans(row).visible_span(causal=False)
    padded = TokenLayout.from_spans([*row, ("pad", 9)]).visible_span(causal=False)
    assert torch.equal(padded[:, :25], alone)
    held = TokenLayout.from_spans([row[0], ("pad", 9), row[1]]).visible_span(causal=False)
    assert held[0, 0].tolist() == [0, 20]
    assert held[0, -1].tolist() == [29, 34]


def test_an_explicit_span_decides_alone() -> None:
    span = torch.tensor([[[0, 3], [1, 2], [0, 0]]])
    layout = TokenLayout.from_modality(torch.tensor([[0, 1, 0]]), span=span)
    for causal in (True, False):
        assert torch.equal(layout.visible_span(causal, tuple(Modality)), span.int())


# From a processor's output.


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def test_placeholder_ids_become_modalities() -> None:
    layout = TokenLayout.from_input_ids(
        ids([5, IMG, IMG, 6, AUD], [AUD, AUD, 7, 8, 9]), image_token_id=IMG, audio_token_id=AUD
    )
    assert layout.modality.tolist() == [[0, 1, 1, 0, 2], [2, 2, 0, 0, 0]]
    assert [runs(row) for row in layout.segment] == [[1, 2, 1, 1], [2, 3]]
    assert layout.valid.all()


def test_several_placeholder_ids_of_one_modality() -> None:
    layout = TokenLayout.from_input_ids(ids([1, IMG, 77, 2]), image_token_id=(IMG, 77))
    assert layout.modality.tolist() == [[0, 1, 1, 0]]


def test_no_placeholder_ids_means_text() -> None:
    assert (TokenLayout.from_input_ids(ids([1, IMG])).modality == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_zeros_of_the_attention_mask_are_padding(side: str) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    mask = mask if side == "left" else mask.flip(1)
    layout = TokenLayout.from_input_ids(torch.zeros(2, 4).long(), attention_mask=mask)
    assert torch.equal(layout.valid, mask.bool())


def test_document_ids_part_a_packed_row() -> None:
    documents = torch.tensor([[0, 0, 3, 3, 3, -1]])
    layout = TokenLayout.from_input_ids(torch.zeros(1, 6).long(), document_ids=documents)
    assert layout.visible_span(causal=False)[0].tolist() == [[0, 2]] * 2 + [[2, 5]] * 3 + [[0, 0]]
    assert runs(layout.segment[0]) == [2, 3, 1]


def test_pictures_that_touch_are_parted_by_their_grids() -> None:
    row = [1] + [IMG] * 10 + [2]
    layout = TokenLayout.from_input_ids(
        ids(row, [IMG] * 6 + [3] * 6), image_token_id=IMG, image_grids=[(2, 2), (2, 3), (3, 2)]
    )
    assert [runs(row) for row in layout.segment] == [[1, 4, 6, 1], [6, 6]]
    for grids, b in zip(layout.grids, (0, 1), strict=True):
        for number, (height, width) in grids.items():
            assert int((layout.segment[b] == number).sum()) == height * width
    assert [list(g.values()) for g in layout.grids] == [[(2, 2), (2, 3)], [(3, 2)]]
    high = layout.visible_span(True, (Modality.IMAGE,))[0, :, 1]
    assert high.tolist() == [1] + [5] * 4 + [11] * 6 + [12]


def test_pictures_that_touch_are_one_segment_without_grids() -> None:
    layout = TokenLayout.from_input_ids(ids([1] + [IMG] * 10 + [2]), image_token_id=IMG)
    assert runs(layout.segment[0]) == [1, 10, 1]
    assert layout.grids == ({},)


@given(batches())
@FEW
def test_placeholder_ids_and_spans_describe_the_same_row(batch: tuple[list[Row], str]) -> None:
    rows, side = batch
    spans = TokenLayout.from_rows(rows, padding_side=side)
    number = torch.tensor([7, IMG, AUD])[spans.modality.long()]
    grids = [
        (1, item[1]) if isinstance(item[1], int) else item[1]
        for row in rows
        for item in row
        if item[0] == "image" and item[1] != 0
    ]
    other = TokenLayout.from_input_ids(
        number,
        image_token_id=IMG,
        audio_token_id=AUD,
        attention_mask=spans.valid.long(),
        document_ids=spans.document,
        image_grids=grids,
    )
    assert torch.equal(other.modality, spans.modality)
    assert torch.equal(other.document, spans.document)
    for kinds in ((), (Modality.IMAGE,)):
        assert torch.equal(other.visible_span(True, kinds), spans.visible_span(True, kinds))


def test_moving_keeps_what_the_layout_says() -> None:
    span = torch.zeros(1, 172, 2)
    layout = TokenLayout.from_spans(MIXED)
    layout = TokenLayout(layout.modality, layout.segment, layout.document, span, layout.grids)
    assert layout.to("meta").device == torch.device("meta")
    moved = layout.to("cpu")
    for name in ("modality", "segment", "document", "span"):
        assert torch.equal(getattr(moved, name), getattr(layout, name))
    assert moved.grids == layout.grids


def test_empty_batches_and_rows_of_no_tokens_work() -> None:
    for layout in (
        TokenLayout.text(0, 10),
        TokenLayout.text(2, 0),
        TokenLayout.from_rows([]),
        TokenLayout.from_input_ids(torch.zeros(0, 4).long(), image_token_id=IMG),
        TokenLayout.from_input_ids(torch.zeros(2, 0).long(), document_ids=torch.zeros(2, 0).int()),
    ):
        span = layout.visible_span(True, (Modality.IMAGE,))
        assert span.shape == (layout.batch, layout.length, 2)


# Bad input.


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([("video", 3)], "kind must be one of ['text', 'image', 'audio', 'pad'], got 'video'"),
        ([(["text"], 3)], "kind must be one of ['text', 'image', 'audio', 'pad'], got ['text']"),
        ([("text", -1)], "size must be a number of tokens, got -1 (text)"),
        ([("text", 2.5)], "size must be a number of tokens, got 2.5 (text)"),
        ([("text", True)], "size must be a number of tokens, got True (text)"),
        ([("text", (2, 3))], "size must be (height, width) of an image, got (2, 3) (text)"),
        ([("image", (2, 3, 4))], "size must be (height, width) of an image, got (2, 3, 4) (image)"),
        ([("image", (0, 4))], "size must be (height, width) of an image, got (0, 4) (image)"),
        ([("image", (2, 1.5))], "size must be (height, width) of an image, got (2, 1.5) (image)"),
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
        "image_grids must be of pictures without a break, got (2, 2) for the image tokens from 0 "
        "to 4 of row 0"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenLayout.from_input_ids(
            ids([IMG, IMG, 5, IMG, IMG]), image_token_id=IMG, image_grids=[(2, 2)]
        )


def test_grids_come_as_a_tensor_too() -> None:
    layout = TokenLayout.from_input_ids(
        ids([IMG] * 10), image_token_id=IMG, image_grids=torch.tensor([[2, 2], [3, 2]])
    )
    assert layout.grids == ({0: (2, 2), 1: (3, 2)},)


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
