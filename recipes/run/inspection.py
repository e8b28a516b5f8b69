"""A recipe's model and a sample of its validation data, for `mm-sparse inspect`.

    mm-sparse inspect mm_sparse.recipes.run.inspect_recipe:recipe \\
        --config recipes/configs/speech/digits.yaml \\
        --ckpt runs/spoken/checkpoints/last.ckpt --sample 3 --out page.html
"""

from typing import Any

import torch

from mm_sparse.analysis import AudioView, ImageView, InspectionSample, draw_scene
from mm_sparse.recipes.data import IGNORED, RATE, Batch, Sample
from mm_sparse.recipes.models import LogMel


def inspection_sample(
    model: Any, collator: Any, sample: Sample, *, generate: bool = True
) -> InspectionSample:
    """What a recipe's model makes of a sample."""
    if not model.sparse_configs:
        raise ValueError("model must run sparse to be inspected, got a dense one")
    batch: Batch = model.transfer_batch_to_device(collator([sample]), model.device, 0)
    if not len(batch["input_ids"]):
        raise ValueError(f"sample must fit into {collator.max_length} tokens, got {sample.name}")
    kinds, learned = model.modality(batch)[0], batch["labels"][0] != IGNORED
    said = model.generate(batch, 64)[0] if generate and bool(learned.any()) else ""
    sights, sounds = media_views(model, batch)
    asked = [part for turn in sample.turns if not turn.answer for part in turn.content]
    question = " ".join(part for part in asked if isinstance(part, str))
    asks = (kinds == 0) & batch["attention_mask"][0]
    # Tokens that predict an answer are those before its own.
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
            "Answer wanted": batch["answers"][0] if batch["answers"] else "",
            "Answer generated": said,
            "Tokens": f"{len(kinds)}, shown are keys of the {len(queries)} that predict answers",
        },
        sights=sights,
        sounds=sounds,
    )


def figures(model: Any, collator: Any, sample: Sample) -> dict[str, Any]:
    """Matplotlib figures of a sample by name; the model goes on as it was."""
    training = model.training
    model.eval()
    try:
        return draw_scene(inspection_sample(model, collator, sample, generate=False))
    finally:
        model.train(training)


def media_views(model: Any, batch: Batch) -> tuple[list[ImageView], list[AudioView]]:
    """Images and audio of a batch of one row, and where their tokens are."""
    kinds = model.modality(batch)[0]
    images = (kinds == 1).nonzero().flatten().tolist()
    heard = (kinds == 2).nonzero().flatten().tolist()
    sights, sounds, at = [], [], 0
    for pixels, grid in zip(batch["pixel_values"], batch["image_grids"], strict=True):
        sights.append(ImageView(pixels, images[at], grid))
        at += grid[0] * grid[1]
    at = 0
    for wave, length in zip(batch["waveforms"], batch["audio_lengths"].tolist(), strict=True):
        count = -(-length // model.audio_projector.samples_per_token)
        mel = LogMel(64)(wave[None, :length].cpu())[0]
        sounds.append(AudioView(mel, heard[at], count, length / RATE))
        at += count
    return sights, sounds
