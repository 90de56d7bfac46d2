"""A labeled image for Python users: labels, classes, pictures, files, COCO annotations."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cliper.pipeline.corpus.decode import to_file_grid, upright
from cliper.pipeline.errors import FilterError, InputError
from cliper.pipeline.extras import require
from cliper.pipeline.report.images import overlay
from cliper.pipeline.run.masks import encode_png, unpack_mask

if TYPE_CHECKING:
    import torch

    from cliper.model.segmentation import Segmentation

BACKGROUND = "background"


@dataclass(frozen=True)
class Found:
    """A class that has pixels in an image."""

    name: str
    label: int  # its value in the mask
    pixels: int
    share: float  # of the image, 0 to 1
    confidence: float  # mean over its pixels, 0 to 1; see Segmentation
    presence: float | None  # the model's score, per image, that the class is there at all; None for background


@dataclass(frozen=True, repr=False)
class Prediction:
    """The mask of one image. Images and masks are in the file's own pixel grid, before EXIF orientation.

    >>> import cliper
    >>> from PIL import Image
    >>> model = cliper.CLIPer.load("tiny", ["grass", "water"])
    >>> result = model(Image.new("RGB", (64, 48), (60, 160, 70)))
    >>> result.labels.shape, result.labels.dtype
    ((48, 64), dtype('uint8'))
    >>> result.overlay().size
    (64, 48)
    """

    image_id: str
    image: np.ndarray = field(repr=False)  # uint8 [H, W, 3], RGB
    labels: np.ndarray = field(repr=False)  # uint8 or uint16 [H, W]: 0 = background or unknown, k = names[k - 1]
    names: tuple[str, ...]  # of all classes that were asked for
    found: tuple[Found, ...]  # labels with pixels, the largest first; background is one of them
    confidence: float  # mean over the image, 0 to 1
    margin: float  # mean lead of the winning class
    orientation: int = 1  # EXIF: how `overlay` turns the image

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the image, the largest first; without background."""
        return tuple(one.name for one in self.found if one.label)

    def mask(self, name: str) -> np.ndarray:
        """The pixels of one class (or "background"): bool [H, W]. Raises FilterError for an unknown class."""
        if name != BACKGROUND and name not in self.names:
            raise FilterError(f"there is no class '{name}'; the classes are: {', '.join(self.names)}")
        return self.labels == (0 if name == BACKGROUND else self.names.index(name) + 1)

    def overlay(self, opacity: float = 0.6) -> Image.Image:
        """The image upright, with the mask over it in the palette of `save`. `opacity` of the mask: 0 to 1.

        Raises InputError for another opacity.
        """
        if not 0 <= opacity <= 1:
            raise InputError(f"opacity is a number from 0 (image only) to 1 (mask only), not {opacity!r:.80}")
        drawn = overlay(self.image, self.labels, opacity)
        return Image.fromarray(np.ascontiguousarray(upright(drawn, self.orientation)))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the labels as PNG: VOC's palette, or 16-bit gray above 254 classes.

        `overlay().save(...)` writes a picture. Raises InputError for another extension: only PNG keeps labels.
        """
        target = Path(path)
        if target.suffix.lower() != ".png":
            raise InputError(f"labels are saved as .png, not '{target.name}'; for a picture: .overlay().save(...)")
        try:
            target.write_bytes(encode_png(self.labels))
        except OSError as error:
            raise InputError(f"cannot write {target}: {error.strerror}") from error

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """COCO annotations, one per class in the image, with compressed RLE; category k is names[k - 1].

        Needs the extra `export`.
        """
        require("export", "to_coco", "pycocotools")
        from cliper.pipeline.export.formats.coco import annotations

        scores = {one.label: round(one.confidence, 4) for one in self.found}
        return [
            {"id": number, "image_id": image_id} | found | {"score": scores[found["category_id"]]}
            for number, found in enumerate(annotations(self.labels), 1)
        ]

    def to_torch(self) -> "torch.Tensor":
        """The labels as a tensor, int64 [H, W]."""
        import torch

        return torch.from_numpy(self.labels.astype(np.int64))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The labels; lets `np.asarray(result)` work."""
        return np.array(self.labels, dtype=dtype, copy=True if copy is None else copy)

    def __repr__(self) -> str:
        height, width = self.labels.shape
        shares = ", ".join(f"{one.name} {one.share:.0%}" for one in self.found)
        return f"Prediction('{self.image_id}', {width} x {height}: {shares}; confidence {self.confidence:.2f})"

    def _repr_png_(self) -> bytes:
        """Show the overlay in a notebook."""
        picture = self.overlay()
        picture.thumbnail((480, 480))
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        return buffer.getvalue()


@dataclass(frozen=True)
class Picture:
    """The image of a prediction: pixels as they are seen, uint8 [h, w, 3], and its EXIF orientation."""

    pixels: np.ndarray
    orientation: int

    @cached_property
    def stored(self) -> np.ndarray:
        """The pixels in the file's grid, uint8 [H, W, 3]."""
        return np.ascontiguousarray(to_file_grid(self.pixels, self.orientation))


def of_segmentation(image_id: str, picture: Picture, names: Sequence[str], result: "Segmentation") -> Prediction:
    """A prediction from the model's result, whose labels are upright."""
    labels = np.ascontiguousarray(to_file_grid(result.labels, picture.orientation))
    present = np.flatnonzero(result.pixels).tolist()
    found = [
        _found(names, k, int(result.pixels[k]), labels.size, result.class_confidence[k], result.presence[k - 1])
        for k in present
    ]
    return Prediction(
        image_id,
        picture.stored,
        labels,
        tuple(names),
        _largest_first(found),
        result.confidence,
        result.margin,
        picture.orientation,
    )


def of_row(row: Mapping[str, Any], picture: Picture, names: Sequence[str]) -> Prediction:
    """A prediction from a run's row."""
    labels = unpack_mask(row)
    found = [
        _found(names, one["class_id"], one["pixels"], labels.size, one["mean_confidence"], one["presence"])
        for one in row["classes"]
        if one["pixels"]
    ]
    return Prediction(
        row["image_id"],
        picture.stored,
        labels,
        tuple(names),
        _largest_first(found),
        row["confidence"],
        row["margin"],
        picture.orientation,
    )


def _found(
    names: Sequence[str], label: int, pixels: int, area: int, confidence: float, presence: float | None
) -> Found:
    if not label:
        return Found(BACKGROUND, 0, pixels, pixels / area, float(confidence), None)
    score = None if presence is None else float(presence)
    return Found(names[label - 1], label, pixels, pixels / area, float(confidence), score)


def _largest_first(found: list[Found]) -> tuple[Found, ...]:
    return tuple(sorted(found, key=lambda one: (-one.pixels, one.label)))
