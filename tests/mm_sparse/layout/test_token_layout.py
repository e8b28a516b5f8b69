"""Which token is what, and what it sees, against a definition that goes token by token."""

import pytest
import torch
from hypothesis import given
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality, TokenLayout
from tests.support.layouts import (
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

IMG = 900

AUD = 901
VID = 902


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


def test_a_span_that_ends_before_it_starts_is_empty() -> None:
    span = torch.tensor([[[0, 2], [2, 1], [3, -4], [7, 9]]])
    layout = TokenLayout.from_modality(torch.zeros(1, 4, dtype=torch.int8), span=span)
    seen = layout.visible_span(causal=True)[0]
    assert seen.tolist() == [[0, 2], [2, 2], [3, 3], [4, 4]]


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


def test_frames_of_a_video_are_segments() -> None:
    layout = TokenLayout.from_spans([("text", 2), ("video", (3, 2, 4)), ("video", 5)], batch=2)
    assert runs(layout.segment[0]) == [2, 8, 8, 8, 5]
    assert layout.grids == ({1: (3, 2, 4)},) * 2
    assert layout.modality[0].tolist() == [0] * 2 + [3] * 29
    low, high = layout.visible_span(True, (Modality.VIDEO,))[0].unbind(-1)
    assert low.eq(0).all()
    assert high.tolist() == [1, 2] + [10] * 8 + [18] * 8 + [26] * 8 + [31] * 5
    assert layout.visible_span(True)[0, :, 1].tolist() == list(range(1, 32))


@pytest.mark.parametrize("grids", [[(2, 1, 3), (3, 2, 1)], torch.tensor([[2, 1, 3], [3, 2, 1]])])
def test_frames_lie_where_their_tokens_are(grids: list | Tensor) -> None:
    # The first video lies in one piece, the second has a time before its last frame.
    row = [1] + [VID] * 10 + [5] + [VID] * 2 + [2]
    layout = TokenLayout.from_input_ids(ids(row), video_token_id=VID, video_grids=grids)
    assert runs(layout.segment[0]) == [1, 3, 3, 2, 2, 1, 2, 1]
    assert layout.grids == ({1: (2, 1, 3), 3: (2, 2, 1), 6: (1, 2, 1)},)
    plain = TokenLayout.from_input_ids(ids(row), video_token_id=[VID])
    assert runs(plain.segment[0]) == [1, 10, 1, 2, 1]
    assert plain.grids == ({},)


@given(batches())
@FEW
def test_placeholder_ids_and_spans_describe_the_same_row(batch: tuple[list[Row], str]) -> None:
    rows, side = batch
    spans = TokenLayout.from_rows(rows, padding_side=side)
    number = torch.tensor([7, IMG, AUD, VID])[spans.modality.long()]

    def grids(kind: str, *sides: int) -> list:
        items = [item for row in rows for item in row if item[0] == kind and item[1] != 0]
        return [(*sides, x[1]) if isinstance(x[1], int) else x[1] for x in items]

    other = TokenLayout.from_input_ids(
        number,
        image_token_id=IMG,
        audio_token_id=AUD,
        attention_mask=spans.valid.long(),
        document_ids=spans.document,
        video_token_id=VID,
        image_grids=grids("image", 1),
        video_grids=grids("video", 1, 1),
    )
    assert torch.equal(other.modality, spans.modality)
    assert torch.equal(other.document, spans.document)
    for kinds in ((), (Modality.IMAGE, Modality.VIDEO)):
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


def test_grids_come_as_a_tensor_too() -> None:
    layout = TokenLayout.from_input_ids(
        ids([IMG] * 10), image_token_id=IMG, image_grids=torch.tensor([[2, 2], [3, 2]])
    )
    assert layout.grids == ({0: (2, 2), 1: (3, 2)},)
