"""The data module of checkpoints: samples in, inputs of the model's own processor out."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, SequentialSampler

from mm_sparse.recipes.data import ResumableLoader, Samples, ShardedOrder
from mm_sparse.recipes.finetuning.chat_collator import ChatCollator
from mm_sparse.recipes.finetuning.checkpoint_folders import load_processor


class ChatData(L.LightningDataModule):
    """Loaders of `ChatCollator`'s batches for training, validation, test and prediction.

    Example:
        >>> ChatData("SmolVLM-Instruct", Messages("train.jsonl"), validation=Messages("val.jsonl"))
    """

    def __init__(
        self,
        folder: str,
        train: Samples,
        *,
        validation: Samples | None = None,
        test: Samples | None = None,
        max_length: int | None = None,
        batch_size: int = 4,
        workers: int = 0,
        shuffle: bool = True,
        processor: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            folder: of the processor, that of the model.
            train: what is learned from.
            validation: what is scored while it learns, and predicted where `test` is None.
            test: what is scored and predicted at the end.
            max_length: a conversation with more tokens is dropped whole, counted and logged.
            batch_size: conversations of a step.
            workers: processes that prepare batches.
            shuffle: whether training draws conversations at random.
            processor: arguments of `AutoProcessor.from_pretrained`, those of the model.
        """
        super().__init__()
        for name, value, low in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        for name, samples in (("train", train), ("validation", validation), ("test", test)):
            if samples is not None and not len(samples):
                raise ValueError(f"{name} must hold at least one sample, got none in {samples!r}")
        self.train, self.validation, self.test = train, validation, test
        self.batch_size, self.workers, self.shuffle = batch_size, workers, shuffle
        self.processor = load_processor(folder, **(processor or {}))
        self.collator = ChatCollator(self.processor, max_length=max_length)
        self.prompter = ChatCollator(self.processor, max_length=max_length, prompts=True)

    def loader(self, samples: Samples, *, training: bool = False) -> DataLoader[Any]:
        """Batches of any samples, with prompts to generate from unless they are for training."""
        kind: Any = ResumableLoader if training else DataLoader
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        sampler: Any = None
        if training and several and not self.shuffle:
            sampler = ShardedOrder(SequentialSampler(samples), self.trainer)
        return kind(
            samples,
            batch_size=self.batch_size,
            shuffle=training and self.shuffle,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collator if training else self.prompter,
            # One of its own: the order depends on the seed alone, a resumed run finds it again.
            generator=torch.Generator().manual_seed(torch.initial_seed()),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.train, training=True)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        return self.loader(self.validation) if self.validation is not None else []

    def test_dataloader(self) -> DataLoader[Any]:
        if self.test is None:
            raise ValueError("test must be given to score on it, got None")
        return self.loader(self.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        samples = self.test if self.test is not None else self.validation
        if samples is None:
            raise ValueError("test or validation must be given to predict on, got None")
        return self.loader(samples)
