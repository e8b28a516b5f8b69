"""Video in models of transformers: tokens by their ids, frames by their grids, and video towers."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse.integrations import context, state
from mm_sparse.integrations.hf.modality_tracker import special_tokens
from mm_sparse.integrations.hf.video_frames import first_of_frames, merge_size
from mm_sparse.layout.patch_order import patch_order
from mm_sparse.modality import Modality
from tests.support.hf_models import IMAGE, SPARSE, TEXT, VIDEO, VISION_START, WHOLE, build

tf: Any = pytest.importorskip("transformers")

# Frames, height and width in patches; four patches are a token.
GRIDS = torch.tensor([[2, 8, 8], [3, 4, 8]])
SIZES = [[16] * 2, [8] * 3]


def inputs(side: str) -> dict[str, Tensor]:
    """Two prompts with a video each, padded on a side."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for sizes in SIZES:
        words = torch.randint(3, 98, (24,), generator=generator)
        words[5] = VISION_START
        rows.append(torch.cat([words[:6], torch.full((sum(sizes),), VIDEO), words[6:]]))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    pixels = torch.randn(int(GRIDS.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
        "pixel_values_videos": pixels,
        "video_grid_thw": GRIDS,
    }


def layouts_of(model: Any, run: Any) -> list[mms.TokenLayout]:
    """Layouts of the calls of the second decoder layer."""
    name = next(n for n, layer in state.attention_layers(model).items() if layer.index == 1)
    calls: list[context.AttentionCall] = []
    with context.capture_attention(model, calls.append):
        run()
    return [call.layout for call in calls if call.name == name and call.layout is not None]


def frames_of(layout: mms.TokenLayout) -> list[list[int]]:
    """By row, lengths of the segments of video."""
    return [
        torch.unique_consecutive(s[m == int(Modality.VIDEO)], return_counts=True)[1].tolist()
        for s, m in zip(layout.segment, layout.modality, strict=True)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_video_and_its_frames_are_known_in_a_forward(side: str) -> None:
    case, given = build("qwen2_5_vl"), inputs(side)
    want = case.model(**given).logits
    mms.sparsify(case.model, WHOLE)
    seen = layouts_of(case.model, lambda: torch.testing.assert_close(
        case.model(**given).logits[given["attention_mask"] == 1],
        want[given["attention_mask"] == 1], atol=1e-4, rtol=1e-4))  # fmt: skip
    (layout,) = seen
    assert layout.modality.equal((given["input_ids"] == VIDEO).to(torch.int8) * 3)
    assert frames_of(layout) == SIZES
    del given["video_grid_thw"], given["pixel_values_videos"], given["mm_token_type_ids"]
    (layout,) = layouts_of(case.model, lambda: case.model(**given))
    assert frames_of(layout) == [[sum(sizes)] for sizes in SIZES]


@torch.no_grad()
def test_frames_that_nothing_tells_from_images_are_what_the_caller_says() -> None:
    """As the processor of InternVL writes them, with words between them."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": [16, 16], "patch_size": [4, 4],
    }  # fmt: skip
    config = tf.InternVLConfig(
        vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, image_token_id=IMAGE,
        image_seq_length=4,
    )  # fmt: skip
    model = mms.sparsify(tf.InternVLForConditionalGeneration(config).eval(), SPARSE)
    frame = [11, *[IMAGE] * 4, 12]
    ids = torch.tensor([[*range(3, 10), *frame, *frame, *range(13, 40)]])
    given = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    run = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    (layout,) = layouts_of(model, lambda: model(**given))
    assert layout.modality.equal((ids == IMAGE).to(torch.int8))
    with mms.set_modality(model, (ids == IMAGE) * int(Modality.VIDEO)):
        layouts = layouts_of(model, lambda: model.generate(**given, **run))
    for layout in layouts:
        assert layout.modality[:, : ids.shape[1]].equal((ids == IMAGE).to(torch.int8) * 3)
        assert not layout.modality[:, ids.shape[1] :].any()
        assert frames_of(layout) == [[4, 4]]


@torch.no_grad()
def test_frames_with_the_placeholder_of_images_are_video() -> None:
    """As the processor of GLM-4V writes them: types of tokens tell that they are a video."""
    torch.manual_seed(0)
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "out_hidden_size": 32, "patch_size": 4, "image_size": 32,
    }  # fmt: skip
    config = tf.Glm4vConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
    )
    model = tf.Glm4vForConditionalGeneration(config).eval()
    words = torch.randint(3, 90, (12,))
    frame = torch.full((16,), IMAGE)
    ids = torch.cat([words[:4], frame, words[4:6], frame, words[6:]])[None]
    types = (ids == IMAGE).long() * 2
    given = {
        "input_ids": ids, "mm_token_type_ids": types,
        "pixel_values_videos": torch.randn(128, 3 * 2 * 4 * 4),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
    }  # fmt: skip
    want = model(**given).logits
    mms.sparsify(model, WHOLE)
    torch.testing.assert_close(model(**given).logits, want, atol=1e-4, rtol=1e-4)
    (layout,) = layouts_of(model, lambda: model(**given))
    assert layout.modality.equal((ids == IMAGE).to(torch.int8) * int(Modality.VIDEO))
    assert frames_of(layout) == [[16, 16]]


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_the_cache_carries_video_and_frames(beams: int) -> None:
    case, given = build("qwen2_5_vl"), inputs("left")
    mms.sparsify(case.model, SPARSE)
    seen = layouts_of(case.model, lambda: case.model.generate(
        **given, max_new_tokens=4, min_new_tokens=4, num_beams=beams, do_sample=False))  # fmt: skip
    assert len(seen) == 4
    length = given["input_ids"].shape[1]
    want = (given["input_ids"] == VIDEO).to(torch.int8).repeat_interleave(beams, 0) * 3
    for step, layout in enumerate(seen):
        assert layout.length == length + step
        assert layout.modality[:, :length].equal(want)
        assert [row[: len(sizes)] for row, sizes in zip(frames_of(layout)[::beams], SIZES,
                strict=True)] == SIZES  # fmt: skip


@torch.no_grad()
def test_report_names_video(tmp_path: Any) -> None:
    case = build("qwen2_5_vl")
    mms.sparsify(case.model, mms.SparseConfig(ratio=0.3, dense_below=0, modality_floor=0.2))
    report = mms.report(case.model, inputs("right"))
    row = next(row for row in report.rows if "language_model.layers.1" in row.name)
    assert {(Modality.TEXT, Modality.VIDEO), (Modality.VIDEO, Modality.TEXT)} <= set(
        row.pair_density or ()
    )
    assert "TEXT>VIDEO" in report.to_json()
    assert "VIDEO>VIDEO" in report.to_json()
    report.plot(tmp_path / "density.png")


@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("Qwen2VLConfig", 151656),
        ("Qwen2_5_VLConfig", 151656),
        ("Qwen3VLConfig", 151656),
        ("Qwen2_5OmniThinkerConfig", 151656),
        ("Qwen2_5OmniConfig", 151656),
        ("LlavaOnevisionConfig", 151647),
        ("VideoLlavaConfig", 32001),
    ],
)
def test_ids_of_video_are_those_of_the_config(name: str, video: int) -> None:
    tokens = special_tokens(getattr(tf, name)())
    assert tokens[video] == Modality.VIDEO
    assert Modality.IMAGE in tokens.values()
    assert (Modality.AUDIO in tokens.values()) == ("Omni" in name)


def test_an_id_of_both_is_that_of_images() -> None:
    config = tf.Qwen2VLConfig(image_token_id=7, video_token_id=7)
    assert special_tokens(config) == {7: Modality.IMAGE}


def test_merge_size_is_found_in_a_part() -> None:
    assert merge_size(tf.Qwen2_5OmniConfig()) == 2
    assert merge_size(tf.LlamaConfig()) is None


def test_frames_begin_where_grids_say() -> None:
    # Sound between the frames of a video, as an omni model places it.
    kinds = torch.tensor([[0, 3, 3, 2, 3, 3, 0], [3, 3, 3, 0, 0, 3, 2]])
    grids = torch.tensor([[2, 2, 4], [1, 2, 6], [1, 2, 2]])
    first = first_of_frames(kinds, grids, 2)
    assert first is not None
    assert first.int().tolist() == [[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 0]]
    assert first_of_frames(kinds, grids[:2], 2) is None
    assert first_of_frames(kinds, grids, None) is None
    assert first_of_frames(kinds, None, 2) is None
    assert first_of_frames(kinds[:, :1], grids, 2) is None


def video_mae(frames: int = 8) -> Any:
    return tf.VideoMAEModel(tf.VideoMAEConfig(
        image_size=40, patch_size=8, num_frames=frames, tubelet_size=2, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=48))  # fmt: skip


def vivit() -> Any:
    return tf.VivitModel(tf.VivitConfig(
        image_size=40, num_frames=8, tubelet_size=[2, 8, 8], hidden_size=32,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=48))  # fmt: skip


def vjepa() -> Any:
    return tf.VJEPA2Model(tf.VJEPA2Config(
        crop_size=40, patch_size=8, frames_per_clip=8, tubelet_size=2, hidden_size=48,
        num_hidden_layers=2, num_attention_heads=2, pred_hidden_size=48, pred_num_hidden_layers=1,
        pred_num_attention_heads=2, pred_num_mask_tokens=1))  # fmt: skip


@pytest.mark.parametrize(("make", "prefix"), [(video_mae, 0), (vivit, 1), (vjepa, 0)])
@torch.no_grad()
def test_units_of_video_towers_are_compact_in_time_and_space(make: Any, prefix: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    pixels = torch.randn(2, 8, 3, 40, 40)
    dense = model(pixels).last_hidden_state
    config = mms.SparseConfig(ratio=0.3, tile=64, dense_below=0, sinks=0, window=0, causal=False)
    mms.sparsify(model, config)
    calls: list[context.AttentionCall] = []
    with context.capture_attention(model, calls.append):
        model(pixels)
    want = torch.arange(prefix + 100)
    want[prefix:] = prefix + torch.tensor(patch_order(4, 5, 5))
    layout = calls[0].layout
    assert layout is not None
    assert layout.order is not None
    assert layout.order[0].equal(want)
    assert layout.modality.eq(int(Modality.VIDEO)).all()
    pairs = mms.report(model).rows[0].pair_density
    assert set(pairs or ()) == {(Modality.VIDEO, Modality.VIDEO)}
    mms.sparsify(model, mms.SparseConfig(ratio=1.0, tile=64, dense_below=0, causal=False))
    torch.testing.assert_close(model(pixels).last_hidden_state, dense, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_videos_of_other_lengths_and_masked_ones_run() -> None:
    model = video_mae().eval()
    mms.sparsify(model, mms.SparseConfig(ratio=0.5, tile=64, dense_below=0, causal=False))
    calls: list[context.AttentionCall] = []
    masked = torch.arange(100)[None] % 2 == 0
    with context.capture_attention(model, calls.append):
        model(torch.randn(1, 8, 3, 40, 40), bool_masked_pos=masked)
    assert calls[0].layout is not None
    assert calls[0].layout.length == 50
    assert calls[0].layout.order is None
