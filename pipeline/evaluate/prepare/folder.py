"""The user's own dataset: images/, labels/ with one PNG of class numbers per image, and classes.txt."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cliper.pipeline.corpus.decode import SUFFIXES
from cliper.pipeline.errors import DatasetError
from cliper.pipeline.evaluate.prepare.base import Sample, need_files, need_folder, read_labels

WHERE = (
    "it is your own: images/NAME.jpg, labels/NAME.png (0 = background, k = class k of classes.txt, and 255, or "
    "65535 in 16-bit files, for pixels that are not counted) and classes.txt"
)


def samples(root: Path, labels: str) -> Iterator[Sample]:
    """Every image of the folder, by name. `labels`: ``png``."""
    images = need_folder(root, ["images"], "images", WHERE)
    folder = need_folder(root, ["labels"], "labels", WHERE)
    pictures = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES)
    if not pictures:
        raise DatasetError(f"{images} holds no images; {WHERE}")
    files = need_files((folder / f"{p.stem}.png" for p in pictures), "labels", WHERE)
    for picture, file in zip(pictures, files, strict=True):
        yield Sample(picture.stem, picture, partial(read_labels, file))
