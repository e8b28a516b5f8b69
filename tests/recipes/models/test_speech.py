"""The speech-language model of the recipe: towers, packing, generation, error rates, bad input."""

import pytest
import torch

import mm_sparse as mms
from mm_sparse.integrations.context import capture_attention
from mm_sparse.modality import Modality
from mm_sparse.recipes.data.collate import Collator
from mm_sparse.recipes.data.samples import Sample, Turn
from mm_sparse.recipes.datasets.digit_dictation import DictationTokenizer, SpokenWords
from mm_sparse.recipes.metrics.density import densities
from mm_sparse.recipes.metrics.word_error_rate import ErrorCounts, plain
from mm_sparse.recipes.models import MultimodalLM
from mm_sparse.recipes.models.audio import (
    HOP,
    AudioConfig,
    FrameProjector,
    FrameProjectorConfig,
    LogMel,
)
from mm_sparse.recipes.models.language import LanguageConfig
from mm_sparse.recipes.training.objectives import Objectives

TOKENIZER = DictationTokenizer()
TINY_LM = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOWERS = {
    "conformer": {"width": 16, "depth": 1, "heads": 2},
    "whisper": {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "max_source_positions": 250,
    },
    "wav2vec2": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": (8,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
    },
}
SPARSE = mms.SparseConfig(
    ratio=0.3, tile=64, unit=16, sinks=0, window=8, bidirectional=(), dense_below=0
)
HEARS = mms.SparseConfig(
    ratio=0.3, tile=64, unit=16, causal=False, sinks=0, window=16, bidirectional=(), dense_below=0
)
EVERYTHING = mms.SparseConfig(ratio=1.0, bidirectional=(), dense_below=0, tile=64)
COLLATOR = Collator(TOKENIZER, samples_per_token=2 * HOP, max_length=600)
PACKER = Collator(TOKENIZER, samples_per_token=2 * HOP, max_length=600, pack=True)


def model(sparse=None, sparse_audio=None, kind="conformer", **options):
    torch.manual_seed(0)
    return MultimodalLM(
        TOKENIZER,
        audio=AudioConfig(kind, options=TOWERS[kind]),
        language=LanguageConfig(options=TINY_LM),
        audio_projector=FrameProjectorConfig(stack=2, positions=4),
        sparse=sparse,
        sparse_audio=sparse_audio,
        **options,
    )


def clips(count=4, words=3):
    data = SpokenWords("train", count, words=words, cell=0.8, speaker="tones")
    return [data[index] for index in range(count)]


def step(speech, batch):
    speech.log = lambda *args, **kwargs: None
    loss = speech.training_step(batch, 0)
    loss.backward()
    return loss.detach()


def trained(module):
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize("kind", TOWERS)
def test_a_step_reaches_every_part_and_both_run_sparse(kind):
    speech = model(SPARSE, HEARS, kind)
    assert torch.isfinite(step(speech, COLLATOR(clips(2, words=6))))
    for part in (speech.audio, speech.audio_projector, speech.language):
        assert trained(part)
    found = densities(speech)
    assert 0 < found["all"] < 0.8
    assert 0 < found["audio/all"] < 0.8
    assert 0 < found["TEXT>AUDIO"] < 1


@pytest.mark.parametrize("kind", TOWERS)
def test_keeping_everything_equals_dense(kind):
    both = mms.SparseConfig(ratio=1.0, causal=False, bidirectional=(), dense_below=0, tile=64)
    batch = COLLATOR(clips(2))
    dense = model(kind=kind).eval()
    sparse = model(EVERYTHING, both, kind, scorer="pooled").eval()
    assert torch.allclose(dense(batch).loss, sparse(batch).loss, atol=1e-5)
    assert dense.state_dict().keys() == sparse.state_dict().keys()


@pytest.mark.parametrize("kind", TOWERS)
def test_a_frame_stands_for_20_ms(kind):
    tower = AudioConfig(kind, options=TOWERS[kind]).build().eval()
    for samples in (HOP * 30, HOP * 30 + 1, HOP * 31):
        with torch.no_grad():
            frames = tower(torch.randn(2, samples), torch.tensor([samples, HOP]))
        assert frames.shape[1] >= -(-samples // HOP)
        assert frames.shape[2] == tower.width
        assert torch.isfinite(frames).all()


@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_a_clip_of_a_packed_row_does_not_hear_its_neighbours(sparse):
    speech = model(sparse, sparse and HEARS).eval()
    with torch.no_grad():
        for parameter in speech.language.parameters():
            parameter *= 3
    first, second, third = clips(3)
    other = Sample(
        (
            Turn((torch.randn(len(second.audio[0])), "transcribe")),
            Turn(("nine nine nine",), answer=True),
        )
    )
    batches = [PACKER([first, middle, third]) for middle in (second, other)]
    assert len(batches[0]["input_ids"]) == 1
    bounds = (batches[0]["position_ids"][0] == 0).nonzero().flatten().tolist()
    with torch.no_grad():
        one, two = (speech.run(batch).logits[0] for batch in batches)
    assert len(bounds) == 3
    _, begin, end = bounds
    assert torch.equal(one[:begin], two[:begin])
    assert not torch.allclose(one[begin:end], two[begin:end], atol=1e-2)
    assert torch.allclose(one[end:], two[end:], atol=1e-5)


def test_packed_clips_give_the_answers_that_they_give_alone():
    speech, samples = model().eval(), clips(3)
    packed, alone = PACKER(samples), COLLATOR(samples)
    assert len(packed["input_ids"]) == 1
    with torch.no_grad():
        assert torch.allclose(speech(packed).loss, speech(alone).loss, atol=1e-4)


@pytest.mark.parametrize("sparse", [None, EVERYTHING], ids=["dense", "everything"])
def test_generation_says_what_teacher_forcing_finds_likeliest(sparse):
    speech, seen = model(sparse, scorer="pooled").eval(), []
    with torch.no_grad():
        for parameter in speech.language.parameters():
            parameter *= 2
    long, short = clips(1, words=6)[0], clips(1)[0]
    said = speech.generate(COLLATOR([long, short]), max_new_tokens=5)
    assert said == [speech.generate(COLLATOR([c]), max_new_tokens=5)[0] for c in (long, short)]
    batch = COLLATOR([long])
    column = int((batch["labels"][0] >= 0).nonzero()[0])
    with torch.no_grad():
        first = int(speech.run(batch).logits[0, column - 1].argmax())
    speech.tokenizer = Spy(seen)
    speech.generate(batch, max_new_tokens=1)
    assert seen[0] == [first]
    assert first != speech.eos_id


class Spy:
    def __init__(self, seen):
        self.seen = seen

    def decode(self, ids):
        self.seen.append(list(ids))
        return ""


def test_a_sparse_model_generates_sparsely():
    speech, modes = model(SPARSE, HEARS).eval(), []
    batch = COLLATOR(clips(2, words=8))
    with capture_attention(
        speech.language, lambda call: modes.append((call.q.shape[2], call.selection))
    ):
        said = speech.generate(batch, max_new_tokens=4)
    assert len(said) == 2
    steps = [chosen for queries, chosen in modes if queries == 1]
    assert steps
    assert all(chosen is not None and chosen.density() < 0.7 for chosen in steps)


def test_generation_refuses_packed_rows_and_rows_without_an_answer():
    with pytest.raises(ValueError, match="one sample per row to generate, got packed rows"):
        model().generate(PACKER(clips(2)))
    silent = Sample((Turn(("transcribe",)),))
    with pytest.raises(ValueError, match="an answer in every row, got a row without"):
        model().generate(COLLATOR([silent]))
    assert model().generate(COLLATOR([])) == []


def test_modality_reaches_the_layers():
    speech, seen = model(SPARSE).eval(), []
    batch = COLLATOR(clips(1))
    with torch.no_grad(), capture_attention(speech.language, seen.append):
        speech(batch)
    kinds = seen[0].scores.plan.layout.modality
    assert torch.equal(kinds == Modality.AUDIO, batch["input_ids"] == TOKENIZER.audio_id)


def test_lessons_teach_the_scorers_of_both_parts_and_nothing_else():
    speech = model(SPARSE, HEARS, objectives=Objectives(language=0.0, scorers=1.0))
    step(speech, COLLATOR(clips(2, words=8)))
    names = {n for n, p in speech.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert all(name.startswith("scorers.") for name in names)
    assert any(name.startswith("scorers.audio/") for name in names)
    assert any(name.startswith("scorers.model/") for name in names)


def test_a_batch_without_audio_passes():
    text = Sample((Turn(("transcribe",)), Turn(("nine",), answer=True)))
    assert step(model(SPARSE, HEARS), COLLATOR([text])) > 0
    assert step(model(), COLLATOR([])) == 0


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="an audio token per 640 samples, 60 for its clips, got"):
        model()(Collator(TOKENIZER, samples_per_token=HOP, max_length=600)(clips(1)))
    image = Sample((Turn((torch.rand(3, 4, 4),)), Turn(("nine",), answer=True)))
    batch = Collator(TOKENIZER, patch_size=4, max_length=600)([image])
    with pytest.raises(ValueError, match="batch must hold no images for a model without vision"):
        model()(batch)
    with pytest.raises(ValueError, match=r"must have up to 80000 samples \(5 s\), got 153600"):
        model(kind="whisper")(COLLATOR(clips(1, words=12)))
    with pytest.raises(ValueError, match="freeze must name parts among"):
        model(freeze=("vision",))
    with pytest.raises(ValueError, match="stack must be at least 1, got 0"):
        FrameProjector(8, 8, stack=0)
    with pytest.raises(ValueError, match=r"weights must be None or a file, got 'gone'"):
        AudioConfig(weights="gone").build()


def test_the_projector_joins_neighbours_and_leaves_padding_out():
    projector, seen = FrameProjector(1, 4, stack=2), []
    projector.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    frames = torch.arange(10.0).view(2, 5, 1)
    tokens = projector(frames, torch.tensor([5 * HOP, 2 * HOP]))
    assert tokens.shape == (3 + 1, 4)
    assert seen[0][0].tolist() == [[0, 1], [2, 3], [4, 0]]


def test_features_are_those_that_whisper_was_trained_on():
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(chunk_length=2)
    wave = clips(1)[0].audio[0]
    wanted = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_features[0]
    padded = torch.nn.functional.pad(wave, (0, 32_000 - len(wave)))
    assert torch.allclose(LogMel(80)(padded[None])[0], wanted, atol=2e-3)


def test_error_rates_count_over_all_answers():
    counts = ErrorCounts()
    counts.add(["apple bridge candle", ""], ["apple ridge", "doctor"])
    counts.add(["zebra"], ["zebra"])
    # One word wrong, one missing, one too many, of four.
    assert counts.wer == pytest.approx(3 / 4)
    assert counts.cer == pytest.approx((1 + 7 + 6) / (19 + 5))
    with pytest.raises(ValueError, match="said must have a text for each of the 1 wanted, got 2"):
        counts.add(["a"], ["a", "b"])


def test_case_and_punctuation_do_not_count():
    assert plain(" It's  a_TEST, (yes)!") == "it's a test yes"
