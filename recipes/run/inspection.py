"""A recipe's model and a sample of its validation data, for `mm-sparse inspect`.

    mm-sparse inspect mm_sparse.recipes.run.inspect_recipe:recipe \\
        --config recipes/configs/speech/digits.yaml \\
        --ckpt runs/spoken/checkpoints/last.ckpt --sample 3 --out page.html
"""

import textwrap
from dataclasses import replace
from typing import Any

import torch

from mm_sparse.analysis import AudioView, ImageView, InspectionSample, draw_sample
from mm_sparse.recipes.data import IGNORED, RATE, Batch, Sample, Turn
from mm_sparse.recipes.models import LogMel


def inspection_sample(
    model: Any, collator: Any, sample: Sample, *, generate: bool = True
) -> InspectionSample:
    """What a recipe's model makes of a sample: of one question, where it has several.

    Of questions about the same images and audio it is the first, else the last: that sees all.
    """
    if not model.sparse_configs:
        raise ValueError("model must run sparse to be inspected, got a dense one")
    sample = first_question(sample)
    batch: Batch = model.transfer_batch_to_device(collator([sample]), model.device, 0)
    if not len(batch["input_ids"]):
        raise ValueError(f"sample must fit into {collator.max_length} tokens, got {sample.name}")
    kinds, learned = model.modality(batch)[0], batch["labels"][0] != IGNORED
    can_say = generate and bool(learned.any())
    said = model.generate(batch, 64, last=True)[0] if can_say else ""
    regions = [turn.asked for turn in sample.turns if turn.asked is not None]
    views, clips = media_views(model, batch, regions[-1] if regions else None)
    asked = [part for turn in last_question(sample) for part in turn.content]
    question = " ".join(part for part in asked if isinstance(part, str))
    wanted = batch["answers"][-1] if batch["answers"] else ""
    asks = (kinds == 0) & batch["attention_mask"][0]
    # Tokens that predict an answer are those before its own.
    number = batch["answer_index"][0]
    learned = learned & (number == number.max())
    before = asks & torch.cat([learned[1:], learned.new_zeros(1)])
    queries = (before if bool(before.any()) else asks).nonzero().flatten().tolist()
    parts = {name: getattr(model, name) for name in model.sparse_configs}
    return InspectionSample(
        title=f"{type(model).__name__}: {sample.name}",
        parts=parts,
        run=lambda: model(batch),
        queries=queries,
        texts={
            "Question": question,
            "Answer wanted": wanted,
            "Answer generated": said,
            "Tokens": f"{len(kinds)}, shown are keys of the {len(queries)} that predict the answer",
        },
        images=views,
        audio=clips,
        caption=caption_of(question, said if generate else None, wanted),
    )


def first_question(sample: Sample) -> Sample:
    """The sample up to its first answer, if what is behind has no picture and no sound."""
    ends = [place for place, turn in enumerate(sample.turns) if turn.answer]
    if not ends:
        return sample
    first = replace(sample, turns=sample.turns[: ends[0] + 1])
    media = [len(s.images) + len(s.audio) for s in (first, sample)]
    return first if media[0] == media[1] else sample


def last_question(sample: Sample) -> list[Turn]:
    """Turns between the last answer and the one before; all that are no answers without one."""
    ends = [place for place, turn in enumerate(sample.turns) if turn.answer]
    first = ends[-2] + 1 if len(ends) > 1 else 0
    last = ends[-1] if ends else len(sample.turns)
    return list(sample.turns[first:last])


def caption_of(question: str, said: str | None, wanted: str) -> str:
    """A figure's title; `said` is None where the model was not asked to answer."""
    answers = [] if said is None else [f"model: {said or 'nothing'}"]
    answers += [f"true: {wanted}"] if wanted else []
    lines = [textwrap.shorten(question, 90), textwrap.shorten("; ".join(answers), 110)]
    return "\n".join(line for line in lines if line)


def figures(model: Any, collator: Any, sample: Sample) -> dict[str, Any]:
    """Matplotlib figures of a sample by name; the model goes on as it was."""
    training = model.training
    model.eval()
    try:
        return draw_sample(inspection_sample(model, collator, sample, generate=False))
    finally:
        model.train(training)


def media_views(
    model: Any, batch: Batch, asked: tuple[int, int, int, int] | None = None
) -> tuple[list[ImageView], list[AudioView]]:
    """Images and audio of a batch of one row, and where their tokens are.

    `asked` are pixels of the last image that a question is about.
    """
    kinds = model.modality(batch)[0]
    images = (kinds == 1).nonzero().flatten().tolist()
    heard = (kinds == 2).nonzero().flatten().tolist()
    views, clips, at = [], [], 0
    for pixels, grid in zip(batch["pixel_values"], batch["image_grids"], strict=True):
        views.append(ImageView(pixels, images[at], grid))
        at += grid[0] * grid[1]
    if views and asked is not None:
        views[-1] = replace(views[-1], asked=asked)
    at = 0
    for wave, length in zip(batch["waveforms"], batch["audio_lengths"].tolist(), strict=True):
        count = -(-length // model.audio_projector.samples_per_token)
        mel = LogMel(64)(wave[None, :length].cpu())[0]
        clips.append(AudioView(mel, heard[at], count, length / RATE))
        at += count
    return views, clips
