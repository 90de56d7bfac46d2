"""Folders of images and label PNGs: `cityscapes` and `ade`, each with a dataset configuration for mmsegmentation.

cityscapes    leftImg8bit/SPLIT/GROUP/NAME_leftImg8bit.png    gtFine/SPLIT/GROUP/NAME_gtFine_labelTrainIds.png
ade           images/{training,validation,testing}/NAME.jpg   annotations/{training,validation,testing}/NAME.png
mmseg.py      the dataset configuration, with names and colors
classes.txt   line k (from 0) names value k

`cityscapes`: class k is value k - 1 (a train id), and background or unknown is 255, which trainers ignore. `ade`:
class k is value k and 0 is background, which mmsegmentation drops (reduce_zero_label).
"""

import pprint
from collections.abc import Iterable, Iterator

import numpy as np

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records, colour, plain_png, require_8_bits
from cliper.pipeline.export.folder import Folder
from cliper.pipeline.export.options import BACKGROUND, SPLITS

GROUP = "cliper"  # in place of Cityscapes' cities
_ADE = {"train": "training", "val": "validation", "test": "testing"}
IGNORE = 255


def train_ids(labels: np.ndarray) -> np.ndarray:
    """Labels uint8 [H, W] as train ids: class k is k - 1, background and the ignore value are 255."""
    return np.where(labels == IGNORE, IGNORE, labels - np.uint8(1)).astype(np.uint8)


def _cityscapes_shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        record = item.record(plan)
        place = f"{record['split']}/{GROUP}/{item.name}"
        folder.write(f"gtFine/{place}_gtFine_labelTrainIds.png", plain_png(train_ids(item.labels)))
        if item.image is not None:
            folder.write(f"leftImg8bit/{place}_leftImg8bit.png", item.image)
        yield record


def _ade_shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        record = item.record(plan)
        place = f"{_ADE[record['split']]}/{item.name}"
        folder.write(f"annotations/{place}.png", plain_png(item.labels))
        if item.image is not None:
            folder.write(f"images/{place}.jpg", item.image)
        yield record


def _cityscapes_finish(records: Records, folder: Folder, plan: Plan) -> None:
    paths = {split: (f"leftImg8bit/{split}", f"gtFine/{split}") for split in SPLITS}
    suffixes = {"img_suffix": "_leftImg8bit.png", "seg_map_suffix": "_gtFine_labelTrainIds.png"}
    _configure(folder, plan, paths, suffixes | {"reduce_zero_label": False}, list(plan.class_names))


def _ade_finish(records: Records, folder: Folder, plan: Plan) -> None:
    paths = {split: (f"images/{name}", f"annotations/{name}") for split, name in _ADE.items()}
    suffixes = {"img_suffix": ".jpg", "seg_map_suffix": ".png", "reduce_zero_label": True}
    _configure(folder, plan, paths, suffixes, [BACKGROUND, *plan.class_names])


def _configure(
    folder: Folder,
    plan: Plan,
    paths: dict[str, tuple[str, str]],
    settings: dict[str, object],
    values: list[str],
) -> None:
    """mmseg.py and classes.txt."""
    folder.write("classes.txt", "".join(f"{name}\n" for name in values).encode())
    shared = {
        "type": "BaseSegDataset",
        "data_root": ".",
        "metainfo": {
            "classes": tuple(plan.class_names),
            "palette": [list(colour(label)) for label in range(1, len(plan.class_names) + 1)],
        },
        "ignore_index": IGNORE,
    }
    lines = ['"""Datasets for mmsegmentation; set data_root to this folder."""\n']
    for split, (image, mask) in paths.items():
        dataset = shared | settings | {"data_prefix": {"img_path": image, "seg_map_path": mask}}
        lines.append(f"{split}_dataset = {pprint.pformat(dataset, sort_dicts=False, width=110)}\n")
    folder.write("mmseg.py", "\n".join(lines).encode())


CITYSCAPES = Exporter(
    _cityscapes_shard,
    _cityscapes_finish,
    image_formats=("PNG",),
    val_share=0.1,
    ignores=True,
    needs_images=True,
    check=require_8_bits,
)
ADE = Exporter(
    _ade_shard,
    _ade_finish,
    image_formats=("JPEG",),
    val_share=0.1,
    ignores=True,
    needs_images=True,
    check=require_8_bits,
)
