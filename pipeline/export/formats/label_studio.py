"""Label Studio: one file of tasks per shard with the masks as brush predictions, and the labeling interface.

tasks/000000.json    import these; masks are in the image's upright grid, as the editor shows it
config.xml           paste as the project's labeling interface
images/NAME.jpg      the images, if copied
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from cliper.pipeline.export.base import Exporter, Item, Plan, Record, Records, hex_colour, require_printable_names
from cliper.pipeline.export.brush import encode_counts
from cliper.pipeline.export.folder import Folder, write_list
from cliper.pipeline.export.regions import components
from cliper.pipeline.export.runlength import label_counts
from cliper.pipeline.storage.uris import is_local, join

FROM_NAME, TO_NAME = "label", "image"


def results(
    labels: np.ndarray,
    class_names: Sequence[str],
    key: str,
    things: set[int] | None = None,
    scores: Mapping[int, float] | None = None,
) -> list[dict[str, Any]]:
    """A brush result per label but 0 of [H, W], per connected region of `things`; `key` makes ids unique."""
    height, width = labels.shape
    ids, owners = components(labels, things) if things else (labels, [])
    return [
        {
            "id": hashlib.blake2b(f"{key}\0{number}".encode(), digest_size=5).hexdigest(),
            "type": "brushlabels",
            "from_name": FROM_NAME,
            "to_name": TO_NAME,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            **({"score": scores[label]} if scores and label in scores else {}),
            "value": {
                "format": "rle",
                "rle": encode_counts(counts),
                "brushlabels": [class_names[label - 1]],
            },
        }
        for number, counts in label_counts(ids.ravel()).items()
        for label in [owners[number - 1] if things else number]
    ]


def task(
    row: Mapping[str, Any],
    labels: np.ndarray,
    class_names: Sequence[str],
    image_url: str,
    things: set[int] | None = None,
    scores: Mapping[int, float] | None = None,
) -> dict[str, Any]:
    """A task with its prediction. `labels` must be in the grid that the editor shows.

    If the image at `image_url` has an EXIF orientation, apply it first (`cliper.pipeline.corpus.decode.upright`).
    """
    return {
        "data": {"image": image_url, "image_id": row["image_id"], "uri": row["uri"]},
        "predictions": [
            {
                "model_version": row["run_fingerprint"],
                "score": row["confidence"],
                "result": results(labels, class_names, row["image_id"], things, scores),
            }
        ],
    }


def image_url(uri: str) -> str:
    """The address for the editor: web and bucket URIs unchanged, local files via Label Studio's file server."""
    if not is_local(uri):
        return uri
    return f"/data/local-files/?d={quote(uri.removeprefix('file://').lstrip('/'))}"


def labeling_config(class_names: Sequence[str]) -> str:
    """The labeling interface as XML."""
    labels = "\n".join(
        f'    <Label value={quoteattr(name)} background="{hex_colour(label)}"/>'
        for label, name in enumerate(class_names, 1)
    )
    return f"""<View>
  <Image name="{TO_NAME}" value="$image" zoom="true"/>
  <BrushLabels name="{FROM_NAME}" toName="{TO_NAME}">
{labels}
  </BrushLabels>
</View>
"""


def _shard(items: Iterable[Item], folder: Folder, plan: Plan, shard: int) -> Iterator[Record]:
    records: list[Record] = []

    def tasks() -> Iterator[dict[str, Any]]:
        for item in items:
            url = item.uri
            if item.image is not None:
                name = f"images/{item.name}{item.image_ending}"
                folder.write(name, item.image)
                url = join(folder.uri, name)
            records.append(item.record(plan))
            yield task(item.row, item.labels, plan.class_names, image_url(url), plan.things, item.scores)

    with folder.create(f"tasks/{shard:06d}.json") as handle:
        write_list(handle, tasks())
    yield from records


def _finish(records: Records, folder: Folder, plan: Plan) -> None:
    folder.write("config.xml", labeling_config(plan.class_names).encode())


LABEL_STUDIO = Exporter(_shard, _finish, as_seen=True, instances=True, check=require_printable_names)
