"""WebDataset: one tar per shard with NAME.mask.png, NAME.json and, if images are copied, NAME.jpg.

index.json lists the tars and their numbers of samples (the `wids` form); classes.json names the labels.
"""

import itertools
import tarfile
from collections.abc import Iterable, Iterator
from io import BytesIO

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records
from cliper.pipeline.export.folder import Folder, compact_json


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    items = iter(items)
    first = next(items, None)
    if first is None:
        return
    name = f"shard-{shard:06d}.tar"
    with folder.create(name) as handle, tarfile.open(fileobj=handle, mode="w") as tar:
        for item in itertools.chain([first], items):
            _add(tar, f"{item.name}.mask.png", item.png)
            if item.image is not None:
                _add(tar, f"{item.name}{item.image_ending}", item.image)
            _add(tar, f"{item.name}.json", compact_json(_metadata(item)))
            yield {"image_id": item.image_id, "name": item.name, "uri": item.uri, "tar": name}


def _metadata(item: Item) -> dict[str, object]:
    return {key: value for key, value in item.row.items() if key not in ("mask", "mask_codec")}


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
    names = {"0": "background"} | {str(label): name for label, name in enumerate(plan.class_names, 1)}
    folder.write("classes.json", compact_json(names))


WEBDATASET = Exporter(_shard, _finish, image_formats=("JPEG", "PNG", "WEBP"))
