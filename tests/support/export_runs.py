"""A run with given masks: scenes and masks that are hard to export, with ids that are hard to convert to names."""

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cliper.model.classes import ClassList, mask_dtype
from cliper.model.segmentation import Segmentation
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.decode import upright
from cliper.pipeline.export.base import Plan
from cliper.pipeline.export.options import Options
from cliper.pipeline.run.folder import Run, class_names
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.rows import RowFilter, read_tables
from cliper.pipeline.storage.backend import Storage
from tests.support.direct import label_directly
from tools.scenes import CLASSES as SCENE_CLASSES
from tools.scenes import SEEDS, make_scenes

SIDE = 80
ODD_NAMES = ["Straße", "草", 'a "b" & <c>', "one, two; {three}", "no. #5: 'six'", "~ no", "yes"]
CLASSES = ClassList.parse([*ODD_NAMES, *SCENE_CLASSES[len(ODD_NAMES) :]])
MANY = ClassList.parse([f"class {k}" for k in range(1, 301)])
HARD_IDS = [
    "a/b/photo.jpg",
    "../../etc/passwd",
    "/absolute/path.png",
    "C:\\windows\\x.jpg",
    "Photo.jpg",
    "photo.JPG",
    "photo.png",
    "写真/猫.jpg",
    "x.y.z.jpg",
    "100% [sure] {1..3} #1?.jpg",
    "~tilde ",
    "con.jpg",
    ".jpg",
    "e\u0301t\u00e9.jpg",
    "l" * 300 + ".jpg",
    "l" * 301 + ".jpg",
]


@dataclass(frozen=True)
class Given:
    """An image file and its mask, both in the file's own grid."""

    image_id: str
    labels: np.ndarray
    orientation: int = 1
    kind: str = "JPEG"

    def file(self) -> bytes:
        """Pixels that encode the label in every channel, so that a rotated image is detected."""
        shade = (self.labels % 32 * 8).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = self.orientation
        exif[0x010E] = "a picture"
        buffer = io.BytesIO()
        Image.fromarray(np.stack([shade] * 3, axis=2)).save(buffer, format=self.kind, exif=exif, quality=95)
        return buffer.getvalue()


def scenes(count: int, classes: ClassList = CLASSES, hard_ids: Sequence[str] = HARD_IDS) -> list[Given]:
    """`count` masks, the first ones special: nothing, one pixel, rings, noise, thin, turned by EXIF."""
    rng = np.random.default_rng(5)
    drawn = [scene.labels for scene in make_scenes(SEEDS["test"], range(count), SIDE)]
    drawn = [labels[: 40 + i % 41, : 79 - i % 23] for i, labels in enumerate(drawn)]
    special: list[np.ndarray] = [np.zeros((30, 40)), np.zeros((30, 40)), np.zeros((41, 41)), np.zeros((1, 1))]
    special[1][7, 9] = len(classes)
    radius = np.hypot(*np.mgrid[-20:21, -20:21])
    special[2][(radius.astype(int) % 4) < 2] = 3
    special += [np.full((1, 50), 2), rng.integers(0, len(classes) + 1, (50, 37)), rng.integers(0, 2, (33, 44))]
    labels = [*special, *(np.where(grid % 7 == 1, 0, grid) for grid in drawn)][:count]
    ids = [*hard_ids, *(f"part{i % 3}/scene-{i:04d}.jpg" for i in range(count))]
    kind = mask_dtype(len(classes))
    found = [Given(name, grid.astype(kind)) for name, grid in zip(ids, labels, strict=False)]
    kinds = {10: "PNG", 11: "WEBP", 12: "TIFF"}
    turned = {
        i: replace(found[i], orientation=1 + i % 8, kind=kinds.get(i % 16, "JPEG"))
        for i in range(8, min(40, count))
    }
    return [turned.get(i, given) for i, given in enumerate(found)]


class Scripted:
    """A segmenter that returns the given masks, in the upright grid."""

    def __init__(self, masks: Mapping[str, np.ndarray], classes: int) -> None:
        self.masks, self.classes = masks, classes

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        found = [Segmentation.of(self.masks[image_id], self.classes) for image_id in image_ids]
        # A confidence of its own for every image, so that filters have something to choose.
        shares = [zlib.crc32(image_id.encode()) % 100 / 100 for image_id in image_ids]
        return [replace(one, confidence=share, margin=share / 2) for one, share in zip(found, shares, strict=True)]


def scripted_run(
    folder: Path,
    given: Sequence[Given],
    classes: ClassList = CLASSES,
    output: str = "",
    storage: Storage | None = None,
    kind: type[Scripted] = Scripted,
    **settings: Any,
) -> Run:
    """Label image files with the masks given, by the real stages; the corpus is a Parquet list."""
    (folder / "files").mkdir(parents=True)
    paths = [folder / "files" / f"{i:04d}.bin" for i in range(len(given))]
    for path, one in zip(paths, given, strict=True):
        path.write_bytes(one.file())
    listed = {"image_id": [one.image_id for one in given], "uri": [str(path) for path in paths]}
    pq.write_table(pa.table(listed), folder / "list.parquet")
    config = JobConfig.model_validate({"shard": {"images": 64}, "input": {"format": "list"}} | settings)
    seen = {one.image_id: np.ascontiguousarray(upright(one.labels, one.orientation)) for one in given}
    return label_directly(
        str(folder / "list.parquet"),
        output or str(folder / "run"),
        config,
        classes,
        lambda config, classes: kind(seen, len(classes)),
        storage,
    )


def stored_masks(run: Run) -> dict[str, np.ndarray]:
    """Every mask of a run in its file's grid, by image id."""
    rows = [row for table in read_tables(run) for row in table.to_pylist()]
    return {row["image_id"]: unpack_mask(row) for row in rows if row["mask_codec"]}


def plan_of(
    run: Run, to: str, images: bool = False, val_share: float = 0.0, keep: RowFilter | None = None
) -> Plan:
    """A plan for a run, of all ok rows if no filter is given."""
    names = class_names(run.identity)
    chosen = Options(val_share=val_share)
    return Plan(to, run.uri, run.fingerprint, names, keep or RowFilter(), images, chosen)
