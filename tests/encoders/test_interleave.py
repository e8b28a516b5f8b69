"""Parts of several encoders become one sequence, whose layout says what is what."""

from dataclasses import replace

import pytest
import torch

import mm_sparse as mms
from mm_sparse.encoders.interleaving import TokenSpec, interleave, interleave_rows, text_spec
from tests.support.encoder_cases import build

TEXT, IMAGE, AUDIO = mms.Modality.TEXT, mms.Modality.IMAGE, mms.Modality.AUDIO


def numbered(rows: int, count: int, first: int) -> torch.Tensor:
    """(rows, count, 2) tokens that tell themselves apart."""
    number = torch.arange(first, first + rows * count).float().view(rows, count)
    return torch.stack([number, -number], -1)


def test_layout_and_embeddings_of_three_modalities() -> None:
    parts = [
        (numbered(2, 3, 100), text_spec(torch.tensor([3, 1]))),
        (numbered(2, 7, 200), TokenSpec(IMAGE, grid=(2, 3), prefix=1)),
        (numbered(2, 5, 300), TokenSpec(AUDIO, rate=50.0, lengths=torch.tensor([2, 5]))),
        (numbered(2, 2, 400), text_spec(document=1)),
    ]
    for side in ("right", "left"):
        embeddings, layout = interleave(parts, padding_side=side)
        assert embeddings.shape == (2, 15, 2)
        rows = [
            [100, 101, 102, *range(200, 207), 300, 301, 400, 401],
            [103, *range(207, 214), *range(305, 310), 402, 403],
        ]
        kinds = [[0] * 3 + [1] * 7 + [2] * 2 + [0] * 2, [0] + [1] * 7 + [2] * 5 + [0] * 2]
        for row in range(2):
            own = layout.valid[row]
            assert embeddings[row, own, 0].tolist() == rows[row]
            assert embeddings[row, ~own].eq(0).all()
            assert layout.modality[row, own].tolist() == kinds[row]
            assert layout.document[row, own].tolist() == [0] * (len(rows[row]) - 2) + [1, 1]
            first = (layout.modality[row].eq(int(IMAGE)) & own).nonzero()[1, 0]
            assert layout.grids[row] == {int(layout.segment[row, first]): (2, 3)}
            assert layout.segment[row, first] != layout.segment[row, first - 1]
        assert layout.valid.sum(1).tolist() == [14, 15]
        assert bool(layout.valid[0, 0]) == (side == "right")


def test_rows_with_parts_of_their_own() -> None:
    image = (numbered(1, 4, 0), TokenSpec(IMAGE, grid=(2, 2)))
    words = (numbered(1, 3, 10), text_spec())
    embeddings, layout = interleave_rows([[words, image, words, image], [words], []])
    assert embeddings.shape == (3, 14, 2)
    assert layout.valid.sum(1).tolist() == [14, 3, 0]
    assert [len(grids) for grids in layout.grids] == [2, 0, 0]


@torch.no_grad()
def test_pieces_of_encoders_go_into_sparse_attention() -> None:
    eyes, images = build("hf-dinov2-registers")
    ears, audio = build("torchaudio-wav2vec2")
    parts = [(torch.randn(2, 9, 32), text_spec()), eyes(*images), ears(*audio)]
    parts += [(torch.randn(2, 20, 32), text_spec(torch.tensor([20, 11])))]
    embeddings, layout = interleave(parts)
    assert layout.valid.sum(1).tolist() == [9 + 149 + 150 + 20, 9 + 149 + 100 + 11]
    assert set(layout.grids[0].values()) == {(12, 12)}
    q = embeddings.unflatten(-1, (2, 16)).transpose(1, 2)
    config = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=0, window=0)
    out = mms.sparse_attention(q, q, q, layout=layout, config=config)
    assert out.isfinite().all()
    assert out.transpose(1, 2)[~layout.valid].eq(0).all()


def test_gradients_reach_the_parts() -> None:
    parts = [numbered(2, 3, 0).requires_grad_(), numbered(2, 4, 9).requires_grad_()]
    embeddings, _ = interleave([(parts[0], text_spec(torch.tensor([3, 2]))),
                                (parts[1], TokenSpec(AUDIO))])  # fmt: skip
    embeddings.sum().backward()
    assert parts[0].grad is not None
    assert parts[0].grad[..., 0].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert parts[1].grad is not None
    assert parts[1].grad.eq(1).all()


def test_a_video_is_a_part_with_its_frames() -> None:
    spec = TokenSpec(mms.Modality.VIDEO, grid=(2, 2, 3), prefix=1)
    _, layout = interleave([(torch.zeros(1, 5, 4), text_spec()), (torch.zeros(1, 13, 4), spec)])
    assert layout.modality[0].tolist() == [0] * 5 + [3] * 13
    assert layout.grids == ({2: (2, 2, 3)},)
    assert layout.segment[0].unique(return_counts=True)[1].tolist() == [5, 1, 6, 6]
    with pytest.raises(ValueError, match=r"grid must cover the tokens, got 1 in front and \(2,"):
        spec.check(torch.zeros(1, 12, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modality": 1}, "modality must be a Modality, got 1"),
        ({"modality": TEXT}, r"grid must be None for TEXT, got \(2, 3\)"),
        ({"rate": 50.0}, "rate must be None for IMAGE, got 50.0"),
        ({"prefix": -1}, "prefix must be an int of at least 0, got -1"),
        ({"document": True}, "document must be an int of at least 0, got True"),
        ({"lengths": [3]}, r"lengths must be a \(B,\) tensor, got \[3\]"),
        ({"lengths": torch.tensor([3])}, "lengths must be None for IMAGE with a grid"),
    ],
)
def test_pieces_that_contradict_themselves_are_refused(change, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        replace(TokenSpec(IMAGE, grid=(2, 3)), **change)


WORDS = numbered(2, 6, 0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "parts must hold at least one"),
        ([(WORDS, TokenSpec(IMAGE, grid=(2, 2)))],
         r"cover the tokens, got 0 in front and \(2, 2\)"),
        ([(WORDS, TokenSpec(IMAGE, prefix=7))], "prefix must be at most the 6 tokens, got 7"),
        ([(WORDS[0], text_spec())], r"tokens must be \(B, N, E\), got \(6, 2\)"),
        ([(WORDS, text_spec(torch.tensor([6])))], "lengths must be for 2 rows, got 1"),
        ([(WORDS, text_spec(torch.tensor([6, 7])))], r"lengths must be in \[0, 6\], got 6 to 7"),
        ([(WORDS, (2, 3))], r"a part must be \(embeddings, Piece\), got tuple"),
        ([(WORDS, text_spec()), (WORDS[:1], text_spec())], r"as many rows each, got \[1, 2\]"),
        ([(WORDS, text_spec()), (WORDS[..., :1], text_spec())], r"same width, got \[1, 2\]"),
        ([(WORDS, text_spec()), (WORDS.double(), text_spec())], "same dtype, got"),
        ([(WORDS, text_spec(document=1)), (WORDS, text_spec())], "document must be an int that"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(parts, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        interleave(parts)


def test_rows_and_sides_are_checked() -> None:
    with pytest.raises(ValueError, match=r"the same rows \(1 each\), got \[1, 2\]"):
        interleave_rows([[(WORDS, text_spec())]])
    with pytest.raises(ValueError, match='padding_side must be "left" or "right", got \'up\''):
        interleave([(WORDS, text_spec())], padding_side="up")
