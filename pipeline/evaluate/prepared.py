"""A prepared benchmark: an index of images and one ground-truth PNG each.

dataset.json          benchmark, classes, fingerprint; written last
index.parquet         image_id, uri, truth, width, height; also an input for `cliper label`
truth/IMAGE_ID.png    labels [H, W]: 0 = background, k = class k of the class list, the largest value = not counted
images/               only where images are cut (Cityscapes halves) or copied
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cliper.pipeline.errors import DatasetError
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.sealed import DamagedFileError, read_sealed
from cliper.pipeline.storage.uris import absolute, join

INDEX = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),  # absolute, or relative to the prepared folder
        pa.field("truth", pa.string(), nullable=False),  # relative to the prepared folder
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Prepared:
    """A prepared benchmark, opened for reading."""

    uri: str
    storage: Storage = field(repr=False)
    benchmark: str
    truth_form: str
    class_names: tuple[str, ...]
    ignore_labels: tuple[int, ...]
    images: int
    expected: int  # 0: any number
    fingerprint: str  # of the ground truth

    @property
    def complete(self) -> bool:
        """Whether the number of images is that of the published benchmark."""
        return self.expected in (0, self.images)

    @property
    def index_uri(self) -> str:
        """The list of images, an input for `cliper label --input`."""
        return join(self.uri, "index.parquet")

    def index(self) -> pa.Table:
        """A table of INDEX, sorted by image_id. Raises DatasetError for a damaged file."""
        try:
            return read_sealed(self.storage.read(self.index_uri), INDEX)
        except DamagedFileError as error:
            raise DatasetError(f"{self.index_uri} is damaged ({error}); run 'cliper prepare' again") from error


def open_prepared(uri: str, storage: Storage) -> Prepared:
    """Open the output of `prepare`. Raises DatasetError."""
    try:
        content = storage.read_json(join(uri, "dataset.json"))
    except FileNotFoundError as error:
        raise DatasetError(
            f"{uri} holds no prepared benchmark (dataset.json); "
            f"run 'cliper prepare BENCHMARK --root DIR --output {uri}'"
        ) from error
    except ValueError as error:
        raise _damaged(uri) from error
    try:
        digest = content.pop("digest", None)
        if digest is not None and digest != content_digest(content):
            raise _damaged(uri)
        content |= {key: tuple(content[key]) for key in ("class_names", "ignore_labels")}
        return Prepared(absolute(uri), storage, **content)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(uri) from error


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 in hex of the content of dataset.json, its key "digest" left out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damaged(uri: str) -> DatasetError:
    return DatasetError(f"{join(uri, 'dataset.json')} is damaged; run 'cliper prepare' again")
