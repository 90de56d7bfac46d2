"""Settings of an export beside its filter: splits, classes, regions, polygons, doubtful classes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cliper.model.errors import ConfigError
from cliper.pipeline.config import suggest

BACKGROUND = "background"
SPLITS = ("train", "val", "test")
Segmentation = Literal["rle", "rle-uncompressed", "polygon"]
SEGMENTATIONS: tuple[Segmentation, ...] = ("rle", "rle-uncompressed", "polygon")


@dataclass(frozen=True)
class Options:
    """Options of every format; a format refuses those that it cannot follow (see `Exporter`).

    `val_share`, `test_share`: of the images, 0 to 1; None: the format's default. `split_by`: "image"; "folder":
    the images of a folder stay together; or a regular expression whose first group in the id names the group.
    `listed`: image id to split, for images with a given split. `segmentation`: of `coco`. `instances`: an
    annotation per connected region; `things`: only of these classes. `min_region`: smaller regions become
    background; `fill_holes`: smaller holes take the class around them (both in pixels). `simplify`: the largest
    distance, in pixels, between a polygon and the outline. `ignore_below`: a class of lower mean confidence in an
    image becomes the ignore value there. `rename`: class to new name, the same name merges; `drop`: classes that
    become background; `background`: the name of a class made of background pixels.
    """

    val_share: float | None = None
    test_share: float = 0.0
    split_by: str = "image"
    listed: Mapping[str, str] = field(default_factory=dict, repr=False)
    segmentation: Segmentation = "rle"
    instances: bool = False
    things: tuple[str, ...] = ()
    min_region: int = 0
    fill_holes: int = 0
    simplify: float = 0.0
    ignore_below: float | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    background: str | None = None

    def check(self, classes: Sequence[str]) -> None:
        """Raise ConfigError for a value out of range, or a name that the run does not have."""
        val, test = self.val_share or 0.0, self.test_share
        if val + test > 1 or min(val, test) < 0:
            raise ConfigError(f"the shares of val and test are from 0 to 1 together, not {val:g} and {test:g}")
        if self.segmentation not in SEGMENTATIONS:
            raise ConfigError(f"segmentation is {', '.join(SEGMENTATIONS)}, not '{self.segmentation}'")
        if self.ignore_below is not None and not 0 <= self.ignore_below <= 1:
            raise ConfigError(f"the confidence to ignore below is 0 to 1, not {self.ignore_below:g}")
        if min(self.min_region, self.fill_holes, self.simplify) < 0:
            raise ConfigError("areas and distances of regions are not negative")
        for name in (*self.rename, *self.drop):
            if name not in classes:
                raise ConfigError(f"the run has no class '{name}'; {suggest(name, classes)}")
        strange = [split for split in self.listed.values() if split not in SPLITS]
        if strange:
            raise ConfigError(f"a split is {', '.join(SPLITS)}, not '{strange[0]}'")
        self._check_group()
        names = self.names(classes)
        for name in self.things:
            if name not in names:
                raise ConfigError(f"there is no class '{name}' to count as things; {suggest(name, names)}")

    def _check_group(self) -> None:
        try:
            re.compile(self.split_by)
        except re.error as error:
            raise ConfigError(f"--split-by is image, folder or a regular expression: {error}") from error

    def names(self, classes: Sequence[str]) -> tuple[str, ...]:
        """The exported classes: renamed, without the dropped ones, background last if it is one."""
        kept = [self.rename.get(name, name) for name in classes if name not in self.drop]
        return tuple(dict.fromkeys([*kept, *([self.background] if self.background else [])]))

    def label_of(self, classes: Sequence[str]) -> tuple[int, ...]:
        """The exported label of each of the run's labels 0, 1, ..."""
        number = {name: label for label, name in enumerate(self.names(classes), 1)}
        nothing = number[self.background] if self.background else 0
        return (
            nothing,
            *(number.get(self.rename.get(c, c), 0) if c not in self.drop else nothing for c in classes),
        )

    def group(self, image_id: str) -> str:
        """The group of an image: images of one group are in one split."""
        if self.split_by == "image":
            return image_id
        if self.split_by == "folder":
            return image_id.rpartition("/")[0]
        found = re.search(self.split_by, image_id)
        return image_id if found is None else found[1 if found.re.groups else 0] or ""
