"""Text, images and audio in one sequence: layout, budgets, floors, data."""

import numpy as np
import pytest
import torch
from PIL import Image

import mm_sparse as mms
from mm_sparse.integrations.context import capture_attention
from mm_sparse.modality import Modality
from mm_sparse.recipes.data.collate import Collator
from mm_sparse.recipes.data.samples import RATE, Sample, Turn
from mm_sparse.recipes.data.splits import split_of
from mm_sparse.recipes.datasets.spoken_stamps import SpokenStamps, YesNoTokenizer
from mm_sparse.recipes.metrics.density import densities
from mm_sparse.recipes.models import MultimodalLM
from mm_sparse.recipes.models.audio import AudioConfig, FrameProjectorConfig
from mm_sparse.recipes.models.language import LanguageConfig
from mm_sparse.recipes.models.vision import ProjectorConfig, VisionConfig
from mm_sparse.recipes.run.inspection import inspection_sample
from mm_sparse.recipes.training.objectives import Objectives

soundfile = pytest.importorskip("soundfile")

TOKENIZER = YesNoTokenizer()
COLLATOR = Collator(TOKENIZER, patch_size=4, samples_per_token=640, max_length=2000)
TOWER = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
TOWER |= {"class_token": False, "global_pool": ""}
LM = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RATIO = 0.3


def config(**options):
    base = {"ratio": RATIO, "tile": 64, "unit": 16, "sinks": 0, "window": 0}
    return mms.SparseConfig(**{**base, "bidirectional": (), "dense_below": 0, **options})


def model(sparse=None, **options):
    torch.manual_seed(0)
    return MultimodalLM(
        TOKENIZER,
        vision=VisionConfig(image_size=32, options=TOWER),
        audio=AudioConfig(options={"width": 16, "depth": 1, "heads": 2}),
        language=LanguageConfig(options=LM),
        projector=ProjectorConfig(),
        audio_projector=FrameProjectorConfig(),
        sparse=sparse,
        **options,
    )


def sample(pairs=2):
    torch.manual_seed(1)
    turns = []
    for _ in range(pairs):
        content = (torch.rand(3, 32, 32), torch.randn(RATE * 2), "is this it?")
        turns += [Turn(content), Turn(("yes",), answer=True)]
    return Sample(tuple(turns), "three")


def kept(speech):
    """Selections and layout of a forward pass on two pairs."""
    found = []
    with torch.no_grad(), capture_attention(speech.language, found.append):
        speech(COLLATOR([sample()]))
    return [call.selection for call in found]


def test_segments_follow_the_turns():
    layout = kept(model(config()).eval())[0].plan.layout
    kinds, segments = layout.modality[0], layout.segment[0]
    runs = [int(kinds[segments == s][0]) for s in segments.unique()]
    assert [Modality(kind).name for kind in runs] == ["IMAGE", "AUDIO", "TEXT"] * 2
    lengths = [int((segments == s).sum()) for s in segments.unique()]
    assert lengths == [64, 50, 6, 64, 50, 6]


@pytest.mark.parametrize("kind", [Modality.IMAGE, Modality.AUDIO])
def test_budget_and_floor_of_a_modality_hold(kind):
    with_floor = kept(model(config(modality_floor={kind: 0.7})).eval())
    free = kept(model(config()).eval())
    shares = []
    for selections in (with_floor, free):
        mask = selections[0].to_dense_mask()[0, :, -1]  # (H, M) of the last token
        budget = RATIO * mask.shape[-1]
        assert (mask.sum(-1) <= budget + 16).all()
        chosen = mask[:, selections[0].plan.layout.modality[0] == kind].sum(-1)
        shares.append(chosen.float().mean() / budget)
    assert shares[0] >= 0.7 - 0.1
    assert shares[0] > shares[1] + 0.1


def test_every_pair_of_modalities_is_reported_and_towers_run_sparse():
    both = {"sparse_vision": config(causal=False), "sparse_audio": config(causal=False)}
    speech = model(config(), **both).eval()
    speech(COLLATOR([sample()]))
    found = densities(speech)
    kinds = ["TEXT", "IMAGE", "AUDIO"]
    assert {f"{q}>{k}" for q in kinds for k in kinds} <= set(found)
    assert 0 < found["vision/all"] < 1
    assert 0 < found["audio/all"] < 1


def test_a_step_reaches_every_part():
    speech = model(config(), objectives=Objectives(scorers=1.0))
    speech.log = lambda *args, **kwargs: None
    speech.training_step(COLLATOR([sample(), sample(1)]), 0).backward()
    for name in speech.parts:
        part = getattr(speech, name)
        assert any(p.grad is not None and bool(p.grad.any()) for p in part.parameters()), name


@pytest.mark.parametrize(
    "content", [("is this it?",), (torch.rand(3, 32, 32),), (torch.rand(900),)]
)
def test_a_sample_may_lack_any_modality(content):
    alone = Sample((Turn(content), Turn(("no",), answer=True)))
    speech = model(config())
    speech.log = lambda *args, **kwargs: None
    assert speech.training_step(COLLATOR([alone]), 0) > 0


def test_an_inspection_sample_shows_images_and_audio_at_their_places():
    shown = inspection_sample(model(config()).eval(), COLLATOR, sample())
    assert [sight.start for sight in shown.images] == [0, 120]
    assert [(s.start, s.count) for s in shown.audio] == [(64, 50), (184, 50)]
    # The last question, which sees all of them.
    assert len(shown.queries) >= 1
    assert min(shown.queries) > 184 + 50


@pytest.fixture
def root(tmp_path):
    """Stamps of plain colours that say their captions."""
    for kind in range(40):
        Image.new("RGB", (8, 8), (kind, 0, 0)).save(tmp_path / f"{kind}.png")
        (tmp_path / f"{kind}.txt").write_text(f"Kind {kind}.\n")
        wave = np.full(4000, kind / 100, "f4")
        soundfile.write(tmp_path / f"{kind}_desc.ogg", wave, RATE)
    (tmp_path / "0_desc.ogg").unlink()
    return str(tmp_path)


def test_spoken_stamps_answer_whether_audio_and_image_belong_together(root):
    data = SpokenStamps("train", 10, pairs=2, image_size=8, root=root)
    captions = {stamp.caption for stamp in data.stamps}
    assert "Kind 0" not in captions
    assert {split_of(caption) for caption in captions} == {"train"}
    said = []
    for index in range(10):
        turns = data[index].turns
        assert len(turns) == 4
        for asked, answer in zip(turns[::2], turns[1::2], strict=True):
            image, audio, _ = asked.content
            shown = round(float(image[0, 4, 4]) * 255)
            heard = round(float(audio[1000:3000].mean()) * 100)
            said.append(answer.content[0])
            assert (answer.content[0] == "yes") == (shown == heard)
    assert set(said) == {"yes", "no"}


def test_spoken_stamps_refuse(root):
    with pytest.raises(ValueError, match="pairs must be at least 1, got 0"):
        SpokenStamps(pairs=0, root=root)
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        SpokenStamps(seconds=0, root=root)
