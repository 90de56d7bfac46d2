"""Segmenters for tests of the flow, where the model does not matter; and corpora for them."""

import io
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import resident
from cliper.model.classes import ClassList
from cliper.model.config import Settings
from cliper.model.segmentation import Segmentation
from cliper.pipeline.config import JobConfig
from cliper.pipeline.label.segmenters import SegmenterFactory, SegmenterKind

CLASSES = ClassList.parse(["dark", "middle", "bright"])


def brightness_labels(image: np.ndarray) -> np.ndarray:
    """Labels 0 to 3 by the brightness of the red channel: uint8 [H, W]."""
    return (image[..., 0] >> 6).astype(np.uint8)


class Brightness:
    """Labels by brightness; a stand-in that is fast and whose every pixel a test can predict."""

    def __init__(self, config: JobConfig, classes: ClassList) -> None:
        self.classes = len(classes)

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        return [Segmentation.of(brightness_labels(image), self.classes) for image in images]


class Keeping(Brightness):
    """Raises where a tensor's memory goes back to the kernel when it is freed."""

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        tensor = np.ones(100 << 20, np.uint8)
        held = resident()
        del tensor
        if held - resident() > 50 << 20:
            raise RuntimeError("given back")
        return super().segment(images, image_ids)


class Slow(Brightness):
    """20 ms per image, like a small GPU model."""

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        time.sleep(0.02 * len(images))
        return super().segment(images, image_ids)


class Fragile(Brightness):
    """Raises for ids with "raise", kills its own process for ids with "kill", never ends for ids with "hang"."""

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        if any("kill" in image_id for image_id in image_ids):
            os.kill(os.getpid(), signal.SIGKILL)
        if any("hang" in image_id for image_id in image_ids):
            time.sleep(100_000)
        bad = [image_id for image_id in image_ids if "raise" in image_id]
        if bad:
            raise RuntimeError(f"cannot segment {bad[0]}")
        return super().segment(images, image_ids)


@dataclass(frozen=True)
class Stumbles:
    """Makes Fragile segmenters, of which the first does not start. `folder` is for its note."""

    folder: str

    def __call__(self, config: JobConfig, classes: ClassList) -> Fragile:
        note = Path(self.folder) / "stumbled"
        if not note.exists():
            note.touch()
            raise RuntimeError("not yet")
        return Fragile(config, classes)


def kind(segmenter: SegmenterFactory) -> SegmenterKind:
    name = getattr(segmenter, "__name__", type(segmenter).__name__)
    return SegmenterKind(Settings, segmenter, lambda config: {"fake": name}, lambda config: name)


def jpeg(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A small smooth photograph-like JPEG, different for every seed."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


BROKEN = {  # five kinds of broken file, and the error_type each must get
    "empty": b"",
    "not_an_image": b"<html>404 not found</html>",
    "corrupt": jpeg(0)[:400],
    "oversized": b"",  # filled in below: a tiny file that claims 30,000 x 30,000 pixels
    "unsupported": b"",
}


def _claims_huge() -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _float_tiff() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(buffer, format="TIFF")
    return buffer.getvalue()


BROKEN["oversized"] = _claims_huge()
BROKEN["unsupported"] = _float_tiff()


def write_corpus(folder: Path, images: int, broken_each: int = 0) -> dict[str, bytes]:
    """Write `images` files of which 5 * `broken_each` are broken, in subfolders; returns name -> content."""
    contents: dict[str, bytes] = {}
    for kind_name, data in BROKEN.items():
        contents |= {f"broken/{kind_name}-{i}.jpg": data for i in range(broken_each)}
    good = images - len(contents)
    contents |= {f"part{i % 7}/photo-{i:05d}.jpg": jpeg(i) for i in range(good)}
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return contents
