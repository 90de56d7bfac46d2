"""PASCAL VOC's folders, in the layout of mmsegmentation and torchvision.

JPEGImages/NAME.jpg                    the images, if copied
SegmentationClass/NAME.png             labels in VOC's palette; 16-bit grayscale above 254 classes
ImageSets/Segmentation/train.txt       names, one per line; and val.txt
classes.txt                            line k (from 0) names label k: background first
"""

from collections.abc import Iterable, Iterator

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records
from cliper.pipeline.export.folder import Folder

BACKGROUND = "background"


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    for item in items:
        folder.write(f"SegmentationClass/{item.name}.png", item.png)
        if item.image is not None:
            folder.write(f"JPEGImages/{item.name}.jpg", item.image)
        split = plan.split(item.image_id)
        yield {"image_id": item.image_id, "name": item.name, "uri": item.uri, "split": split}


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    folder.write("classes.txt", "".join(f"{name}\n" for name in [BACKGROUND, *plan.class_names]).encode())
    lists = "ImageSets/Segmentation"
    with folder.create(f"{lists}/train.txt") as train, folder.create(f"{lists}/val.txt") as val:
        for record in records:
            (val if record["split"] == "val" else train).write(f"{record['name']}\n".encode())


VOC = Exporter(_shard, _finish, image_formats=("JPEG",), splits=True, needs_images=True)
