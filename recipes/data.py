"""The data module of the vision-language recipe: samples in, batches out.

    VLMData(DigitCanvases(), DigitTokenizer(), validation=DigitCanvases("test", 512), patch_size=4)

Any `Samples` can be read: `digits.DigitCanvases`, `pictures.StampGrids`, `pictures.StampCaptions`,
`llava.LlavaJson`, `samples.Course` (sets one after the other), or one of your own. In YAML each is
a `class_path` with its `init_args`.
"""

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from mm_sparse.recipes.samples import Batch, Collator, Samples, Template
from mm_sparse.recipes.vocabulary import Tokenizer


class VLMData(L.LightningDataModule):
    """Loaders of `recipes.samples.Batch` for training, validation and test."""

    def __init__(
        self,
        train: Samples,
        tokenizer: Tokenizer,
        *,
        patch_size: int,
        validation: Samples | None = None,
        test: Samples | None = None,
        template: Template | None = None,
        max_length: int = 2048,
        batch_size: int = 16,
        workers: int = 0,
        shuffle: bool = True,
    ) -> None:
        """
        Args:
            train: what is learned from.
            tokenizer: words to ids; the model takes its size and special ids from here.
            patch_size: pixels that one image token covers, each way.
            validation: what is scored after an epoch.
            test: what is scored at the end.
            template: text around the turns.
            max_length: a sample with more tokens is dropped whole, counted and logged.
            batch_size: samples of a step.
            workers: processes that prepare batches.
            shuffle: whether training draws samples at random; off for a `samples.Course`.
        """
        super().__init__()
        for name, value, low in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        self.train, self.validation, self.test = train, validation, test
        self.tokenizer = tokenizer
        self.batch_size, self.workers, self.shuffle = batch_size, workers, shuffle
        self.collator = Collator(
            tokenizer, patch_size=patch_size, max_length=max_length, template=template
        )

    def loader(self, samples: Samples, shuffle: bool = False) -> DataLoader[Batch]:
        """Batches of any samples, the way this module makes them."""
        loader: Any = DataLoader(
            samples,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collator,
        )
        return loader

    def train_dataloader(self) -> DataLoader[Batch]:
        return self.loader(self.train, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        return self.loader(self.validation) if self.validation is not None else []

    def test_dataloader(self) -> DataLoader[Batch]:
        if self.test is None:
            raise ValueError("test must be given to score on it, got None")
        return self.loader(self.test)
