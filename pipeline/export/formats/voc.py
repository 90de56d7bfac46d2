"""PASCAL VOC's folders, where torchvision and mmsegmentation look for them: below VOCdevkit/VOC2012.

JPEGImages/NAME.jpg                    the images, if copied
SegmentationClass/NAME.png             labels in VOC's palette; 16-bit grayscale above 254 classes
ImageSets/Segmentation/train.txt       names, one per line; and val.txt, trainval.txt, test.txt
labelmap.txt                           names and colors, for datumaro and CVAT
classes.txt                            line k (from 0) names label k: background first
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records, colour
from cliper.pipeline.export.folder import Folder
from cliper.pipeline.export.options import BACKGROUND

ROOT = "VOCdevkit/VOC2012"
_LISTS = {"train": ("train", "trainval"), "val": ("val", "trainval"), "test": ("test",)}


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        folder.write(f"{ROOT}/SegmentationClass/{item.name}.png", item.png)
        if item.image is not None:
            folder.write(f"{ROOT}/JPEGImages/{item.name}.jpg", item.image)
        yield item.record(plan)


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    names = [BACKGROUND, *plan.class_names]
    folder.write(f"{ROOT}/classes.txt", "".join(f"{name}\n" for name in names).encode())
    colours = [",".join(map(str, colour(label))) for label in range(len(names))]
    lines = [f"{name.replace(':', '_')}:{rgb}::\n" for name, rgb in zip(names, colours, strict=True)]
    folder.write(f"{ROOT}/labelmap.txt", ("# label:color_rgb:parts:actions\n" + "".join(lines)).encode())
    with ExitStack() as stack:
        lists = {
            name: stack.enter_context(folder.create(f"{ROOT}/ImageSets/Segmentation/{name}.txt"))
            for name in ("train", "val", "trainval", "test")
        }
        for record in records:
            for name in _LISTS[record["split"]]:
                lists[name].write(f"{record['name']}\n".encode())


def _notes(plan: Plan) -> Sequence[str]:
    found = []
    if len(plan.class_names) > 254:
        found.append("more than 254 classes: masks are 16-bit PNGs, which readers of VOC's 8-bit palette refuse")
    if any(":" in name for name in plan.class_names):
        found.append("labelmap.txt separates its columns by colons: in class names they became _")
    return found


VOC = Exporter(
    _shard,
    _finish,
    image_formats=("JPEG",),
    val_share=0.1,
    ignores=True,
    needs_images=True,
    notes=_notes,
)
