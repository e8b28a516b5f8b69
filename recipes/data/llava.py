"""LLaVA's JSON with a folder of images.

    [{"id": "1", "image": "cat.png",
      "conversations": [{"from": "human", "value": "<image>What is it?"},
                        {"from": "gpt", "value": "A cat."}]}]

`<image>` stands for the next image, at any place of any human turn. `image` is a name, a list of
names, or absent in a row of text alone.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from mm_sparse.recipes.data.images import MAX_PIXELS, on_white, read_tensor, to_tensor
from mm_sparse.recipes.data.samples import MediaSamples, Sample, Turn

TAG = "<image>"
SPEAKERS = {
    "human": False,
    "user": False,
    "system": False,
    "gpt": True,
    "assistant": True,
}


class LlavaJson(MediaSamples):
    """Every row is checked when the file is read; images are opened when they are needed."""

    def __init__(
        self,
        path: str,
        image_folder: str = ".",
        *,
        image_size: int | None = 224,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Images are fitted into a white square of `image_size` pixels; None keeps their own size.

        `max_pixels` is that of `read_image`: an image with more counts as damaged.
        """
        super().__init__()
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        self.path, self.folder, self.image_size = Path(path), Path(image_folder), image_size
        self.max_pixels = max_pixels
        if not self.path.is_file():
            raise ValueError(f"path must be a JSON file, got {path!r}, which is no file")
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":
                raise ValueError(
                    f"{path}: the file must hold one JSON list, got more behind it, as JSON lines "
                    "have: put the rows into [ ] with commas between them"
                ) from error
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(rows, list):
            raise ValueError(f"{path}: the file must hold a list, got {type(rows).__name__}")
        if not rows:
            raise ValueError(f"{path}: the file must hold at least one row, got an empty list")
        self.rows: list[dict[str, Any]] = rows
        for index, row in enumerate(rows):
            self.check(index, row)

    def name(self, index: int) -> str:
        """File and row, with the row's id if it has one."""
        row = self.rows[index]
        own = f" (id {row['id']!r})" if isinstance(row, dict) and "id" in row else ""
        return f"{self.path}: row {index}{own}"

    def error(self, index: int, problem: str) -> ValueError:
        """An error that names file and row."""
        return ValueError(f"{self.name(index)}: {problem}")

    def check(self, index: int, row: Any) -> None:
        """Refuses a row that cannot become a sample."""
        if not isinstance(row, dict):
            raise self.error(index, f"must be an object, got {type(row).__name__}")
        turns = row.get("conversations")
        if not isinstance(turns, list) or not turns:
            raise self.error(index, f"'conversations' must be a list with turns, got {turns!r}")
        tags = 0
        for number, turn in enumerate(turns):
            if not isinstance(turn, dict):
                raise self.error(index, f"turn {number} must be an object, got {turn!r}")
            for key in ("from", "value"):
                if not isinstance(turn.get(key), str):
                    got = repr(turn[key]) if key in turn else "nothing"
                    raise self.error(index, f"turn {number}: {key!r} must be a string, got {got}")
            if turn["from"] not in SPEAKERS:
                wanted = ", ".join(SPEAKERS)
                raise self.error(
                    index, f"turn {number}: 'from' must be one of {wanted}, got {turn['from']!r}"
                )
            count = turn["value"].count(TAG)
            if count and SPEAKERS[turn["from"]]:
                raise self.error(index, f"turn {number}: {TAG} must not stand in an answer")
            tags += count
        if not any(SPEAKERS[turn["from"]] for turn in turns):
            raise self.error(index, "needs a turn from gpt, got none")
        images = self.images(index)
        if tags != len(images):
            raise self.error(index, f"has {tags} {TAG} tags and {len(images)} images")
        for image in images:
            if not image.is_file():
                raise self.error(index, f"image {str(image)!r} is not a file")

    def images(self, index: int) -> list[Path]:
        """Paths of a row's images."""
        image = self.rows[index].get("image")
        names = [] if image is None else [image] if isinstance(image, str) else image
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.error(index, f"'image' must be a name or a list of names, got {image!r}")
        return [self.folder / name for name in names]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Sample:
        images = iter(self.images(index))
        turns = []
        for turn in self.rows[index]["conversations"]:
            content = []
            for number, text in enumerate(turn["value"].split(TAG)):
                if number:
                    content.append(self._image(index, next(images)))
                if text:
                    content.append(text)
            speaker = turn["from"]
            turns.append(Turn(tuple(content), SPEAKERS[speaker], system=speaker == "system"))
        return Sample(tuple(turns), f"{self.path}: row {index}")

    def _image(self, index: int, path: Path) -> Tensor:
        name = f"{self.name(index)}: image {str(path)!r}"
        size = self.image_size
        if size is None:
            return read_tensor(path, name=name, max_pixels=self.max_pixels)
        return to_tensor(on_white(path, size, size, name=name, max_pixels=self.max_pixels))
