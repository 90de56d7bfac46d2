"""Cost of input and output on one core: decode, resize, object-store reads, mask encoding.

python -m benchmarks.inputs
"""

import io
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import fsspec
import numpy as np
from PIL import Image

from benchmarks.models import photo
from cliper.pipeline.corpus.decode import decode
from cliper.pipeline.run.masks import MASK_CODECS


def milliseconds(function: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def label_map() -> np.ndarray:
    """A label map of 21 labels with the curved outlines of real masks: uint8 [375, 500]."""
    small = np.random.default_rng(0).random((21, 8, 10)).astype(np.float32)
    planes = [Image.fromarray(plane).resize((500, 375), Image.Resampling.BICUBIC) for plane in small]
    return np.stack([np.asarray(plane) for plane in planes]).argmax(axis=0).astype(np.uint8)


def png(labels: np.ndarray, level: int) -> bytes:
    """PNG at a zlib level."""
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, format="PNG", compress_level=level)
    return buffer.getvalue()


def measure() -> dict[str, dict[str, float]]:
    """Milliseconds of each operation, and bytes of each encoding."""
    image, labels = photo(0), label_map()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=90)
    data = buffer.getvalue()
    store = fsspec.filesystem("memory")
    store.pipe("/bench/photo.jpg", data)
    bicubic = Image.Resampling.BICUBIC
    rows: dict[str, dict[str, float]] = {
        "decode JPEG 500x375": {"ms": milliseconds(lambda: decode(data, 10**8)), "bytes": len(data)},
        "resize bicubic to 448x336": {
            "ms": milliseconds(lambda: Image.fromarray(image).resize((448, 336), bicubic))
        },
        "read, fsspec in memory": {
            "ms": milliseconds(lambda: store.cat_file("/bench/photo.jpg")),
            "bytes": len(data),
        },
    }
    for level in (1, 3, 6, 9):
        encoded = {"ms": milliseconds(partial(png, labels, level)), "bytes": len(png(labels, level))}
        rows[f"encode PNG level {level}"] = encoded
    for name, codec in MASK_CODECS.items():
        ms = milliseconds(partial(codec.encode, labels))
        rows[f"encode codec {name}"] = {"ms": ms, "bytes": len(codec.encode(labels))}
    return rows


if __name__ == "__main__":
    print(json.dumps(measure()))
