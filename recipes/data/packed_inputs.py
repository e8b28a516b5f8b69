"""Inputs of towers in one file: images as PNG or JPEG, or log-mel features of audio.

    python -m mm_sparse.recipes.datasets.prepare_images images.npz ...
    python -m mm_sparse.recipes.datasets.prepare_audio audio.npz ...

B inputs
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# Log-mel features of Whisper lie in a range of 2 below their largest value; bytes hold -1 to 3.
MEL_LOW, MEL_STEP = -1.0, 4 / 255


def write_packed(
    path: str | Path, items: Mapping[str, Sequence[Any]], names: Mapping[str, Sequence[str]]
) -> None:
    """Write items by split and kind ("train/photos"): bytes of image files, or (80, F) features.

    Args:
        names: what each item is of: a file, or the words of an audio clip.
    """
    arrays: dict[str, np.ndarray] = {}
    for key, own in items.items():
        if len(own) != len(names[key]):
            raise ValueError(f"names of {key} must be {len(own)}, got {len(names[key])}")
        if isinstance(own[0], bytes):
            arrays[f"{key}/bytes"] = np.frombuffer(b"".join(own), np.uint8)
            arrays[f"{key}/ends"] = np.cumsum([len(item) for item in own])
        else:
            scaled = (np.stack(own) - MEL_LOW) / MEL_STEP
            arrays[f"{key}/mel"] = scaled.round().clip(0, 255).astype(np.uint8)
        arrays[f"{key}/names"] = np.frombuffer(json.dumps(list(names[key])).encode(), np.uint8)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


class Packed(Dataset[Tensor]):
    """Items of some kinds of a split: images (3, height, width) in [0, 1] or features (80, F)."""

    def __init__(self, arrays: dict[str, np.ndarray], keys: Sequence[str]) -> None:
        self.items: list[Any] = []
        self.names: list[str] = []
        for key in keys:
            if f"{key}/mel" in arrays:
                self.items += list(arrays[f"{key}/mel"])
            else:
                ends = arrays[f"{key}/ends"].tolist()
                data = arrays[f"{key}/bytes"].tobytes()
                self.items += [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            self.names += json.loads(arrays[f"{key}/names"].tobytes())

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        item = self.items[index]
        if isinstance(item, np.ndarray):
            return torch.from_numpy(item).float() * MEL_STEP + MEL_LOW
        from mm_sparse.recipes.data.images import read_image, to_tensor

        return to_tensor(np.array(read_image(item).convert("RGB")))


class PackedData(L.LightningDataModule):
    """What `write_packed` wrote: all kinds mixed to train on, one after another to validate on.

    Args:
        path: the file.
        validation: items of each kind that are validated on.
        size: pixels of a side that images are cut to, from the middle; as they are if None.
    """

    def __init__(
        self, path: str, *, batch_size: int = 1, validation: int = 2, size: int | None = None
    ) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise ValueError(f"path must be a file of recipes.data.packed_inputs, got {path!r}")
        self.arrays = dict(np.load(path))
        self.batch_size, self.validation, self.size = batch_size, validation, size

    def kinds(self, split: str) -> dict[str, Packed]:
        """The items of a split by kind."""
        keys = [k.removesuffix("/names") for k in self.arrays if k.endswith("/names")]
        own = [key for key in keys if key.startswith(split + "/")]
        if not own:
            raise ValueError(f"path must hold items of the split {split!r}, got {keys}")
        return {key.partition("/")[2]: Packed(self.arrays, [key]) for key in own}

    def _loader(self, items: Dataset[Tensor], **options: Any) -> DataLoader[Tensor]:
        return DataLoader(items, collate_fn=self._stack, **options)

    def _stack(self, items: Sequence[Tensor]) -> Tensor:
        batch = torch.stack(list(items))
        if self.size is None or batch.ndim < 4:
            return batch
        top, left = (max(n - self.size, 0) // 2 for n in batch.shape[-2:])
        return batch[..., top : top + self.size, left : left + self.size].contiguous()

    def train_dataloader(self) -> DataLoader[Tensor]:
        keys = [f"train/{kind}" for kind in self.kinds("train")]
        return self._loader(Packed(self.arrays, keys), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Tensor]]:
        loaders = []
        for items in self.kinds("validation").values():
            few = torch.utils.data.Subset(items, range(min(self.validation, len(items))))
            loaders.append(self._loader(few, batch_size=1))
        return loaders
