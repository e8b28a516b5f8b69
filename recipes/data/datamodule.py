"""The data module of the recipes: samples in, batches out.

    SampleData(DigitCanvases(), DigitTokenizer(), validation=DigitCanvases("test"), patch_size=4)

Any `Samples` can be read: of `digits`, `images`, `llava`, `spoken`, `manifests`,
`ConcatSamples` (sets one after the other), or your own. In YAML each is a `class_path` with
`init_args`.
"""

from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader, SequentialSampler

from mm_sparse.recipes.data.collate import Collator
from mm_sparse.recipes.data.samplers import LengthBuckets, ResumableLoader, ShardedOrder
from mm_sparse.recipes.data.samples import CHATML, Batch, Samples, Template
from mm_sparse.recipes.data.tokenizers import Tokenizer


class SampleData(L.LightningDataModule):
    """Loaders of `recipes.data.samples.Batch` for training, validation and test."""

    def __init__(
        self,
        train: Samples,
        tokenizer: Tokenizer,
        *,
        patch_size: int | None = None,
        samples_per_token: int | None = None,
        validation: Samples | None = None,
        test: Samples | None = None,
        template: Template | Literal["chatml"] | None = None,
        max_length: int = 2048,
        batch_size: int = 16,
        workers: int = 0,
        shuffle: bool = True,
        buckets: int = 1,
        pack: bool = False,
    ) -> None:
        """
        Args:
            train: what is learned from.
            tokenizer: words to ids; the model takes its size and special ids from here.
            patch_size: pixels that one image token covers, each way; None: there are no images.
            samples_per_token: samples of audio that one audio token covers: 320 times the frames
                that the projector stacks; None: there is no audio.
            validation: what is scored after an epoch.
            test: what is scored at the end.
            template: text around the turns; "chatml" for the chat format of SmolLM2 and Qwen.
            max_length: a sample with more tokens is dropped whole, counted and logged.
            batch_size: samples of a step.
            workers: processes that prepare batches.
            shuffle: whether training draws samples at random; off for a `samples.ConcatSamples`.
            buckets: groups of like length from which the batches of training are drawn.
            pack: training puts several samples into a row of up to `max_length` tokens; none of
                them sees another.
        """
        super().__init__()
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("buckets", buckets, 1),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        for name, samples in (("train", train), ("validation", validation), ("test", test)):
            if samples is not None and not len(samples):
                raise ValueError(f"{name} must hold at least one sample, got none in {samples!r}")
        if buckets > 1 and not shuffle:
            raise ValueError(f"buckets must be 1 without shuffle, got {buckets}")
        if isinstance(template, str):
            if template != "chatml":
                raise ValueError(f"template must be a Template or 'chatml', got {template!r}")
            template = CHATML
        self.train, self.validation, self.test = train, validation, test
        self.tokenizer = tokenizer
        self.batch_size, self.workers, self.shuffle = batch_size, workers, shuffle
        self.buckets = buckets
        options: dict[str, Any] = {
            "patch_size": patch_size,
            "samples_per_token": samples_per_token,
            "max_length": max_length,
            "template": template,
        }
        self.collator = Collator(tokenizer, **options)
        self.packer = Collator(tokenizer, pack=True, **options) if pack else self.collator

    def loader(
        self, samples: Samples, shuffle: bool = False, *, training: bool = False
    ) -> DataLoader[Batch]:
        """Batches of any samples, the way this module makes them: packed only for training."""
        # One of its own: the order depends on the seed alone, and a resumed run finds it again.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        bucketed = training and self.buckets > 1
        sampler: Any = None
        if bucketed:
            sampler = LengthBuckets(samples, self.buckets, self.batch_size, generator)
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if training and several and (bucketed or not shuffle):
            sampler = ShardedOrder(sampler or SequentialSampler(samples), self.trainer)
        kind: Any = ResumableLoader if training else DataLoader
        loader = kind(
            samples,
            batch_size=self.batch_size,
            shuffle=shuffle and sampler is None,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.packer if training else self.collator,
            generator=generator,
        )
        return loader

    def train_dataloader(self) -> DataLoader[Batch]:
        return self.loader(self.train, shuffle=self.shuffle, training=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        return self.loader(self.validation) if self.validation is not None else []

    def predict_dataloader(self) -> DataLoader[Batch]:
        samples = self.test if self.test is not None else self.validation
        if samples is None:
            raise ValueError("test or validation must be given to predict on, got None")
        return self.loader(samples)

    def test_dataloader(self) -> DataLoader[Batch]:
        if self.test is None:
            raise ValueError("test must be given to score on it, got None")
        return self.loader(self.test)
