"""WebDataset: one tar per shard with NAME.mask.png, NAME.json and, if images are copied, NAME.jpg.

Masks are grayscale: webdataset's decoders turn a palette into colors. 16-bit masks (above 254 classes) need a
decoder of their own, since "pil" and "rgb8" cut them to 8 bits.

index.json lists the tars and their numbers of samples (the `wids` form); classes.json names the labels.
"""

import itertools
import tarfile
from collections.abc import Iterable, Iterator
from io import BytesIO

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records, plain_png
from cliper.pipeline.export.folder import Folder, compact_json


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    items = iter(items)
    first = next(items, None)
    if first is None:
        return
    name = f"shard-{shard:06d}.tar"
    with folder.create(name) as handle, tarfile.open(fileobj=handle, mode="w") as tar:
        for item in itertools.chain([first], items):
            _add(tar, f"{item.name}.mask.png", plain_png(item.labels))
            if item.image is not None:
                _add(tar, f"{item.name}{item.image_ending}", item.image)
            _add(tar, f"{item.name}.json", compact_json(item.metadata))
            yield item.record(plan) | {"tar": name}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # the time is 0, so that the same samples give the same bytes
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    samples: dict[str, int] = {}
    for record in records:
        samples[record["tar"]] = samples.get(record["tar"], 0) + 1
    listed = [{"url": name, "nsamples": count} for name, count in samples.items()]
    folder.write("index.json", compact_json({"wids_version": 1, "name": "cliper", "shardlist": listed}))
    folder.write("classes.json", compact_json(plan.id2label))


WEBDATASET = Exporter(_shard, _finish, image_formats=("JPEG", "PNG", "WEBP"), ignores=True)
