"""TIFF tags: which page of a file is the image, and whether Pillow's reading of its samples is right.

Pillow opens more than it reads right: other sample formats, planes or ranges give wrong pixels without an error.
Only the layouts named in `_problem` are read; all others are `unsupported`.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import TiffImagePlugin

from cliper.pipeline.errors import ImageError

SIGNATURES = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
MOST_PAGES = 1000  # looked at
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_SUBFILE, _OLD_SUBFILE, _SAMPLES, _MAX_VALUE, _PLANAR, _FORMAT = 254, 255, 277, 281, 284, 339
_READ = {1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000}  # compressions of Pillow's wheels
_COMPRESSIONS = {
    34661: "JBIG",
    34712: "JPEG 2000",
    34887: "LERC",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_PHOTOMETRICS = {0: "min-is-white", 1: "min-is-black", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 4: "untyped", 5: "complex", 6: "complex"}


@dataclass(frozen=True)
class Page:
    """One image of a TIFF file, by its tags."""

    index: int
    width: int
    height: int
    bits: tuple[int, ...]  # per sample
    samples: int
    sample_format: int
    photometric: int
    planar: int
    compression: int
    reduced: bool  # a thumbnail or a mask of another page
    max_value: int | None

    def __str__(self) -> str:
        """The layout in words, for messages."""
        bits = "/".join(map(str, sorted(set(self.bits))))
        kind = _FORMATS.get(self.sample_format, f"SampleFormat {self.sample_format}")
        colour = _PHOTOMETRICS.get(self.photometric, f"photometric {self.photometric}")
        planes = ", in planes" if self.planar == 2 and self.samples > 1 else ""
        return f"{self.samples} x {bits}-bit {kind} samples, {colour}{planes}"

    @property
    def top(self) -> int:
        """The sample value of full brightness (of black, if min-is-white)."""
        full = 2 ** self.bits[0] - 1
        return self.max_value if self.max_value and self.max_value < full else full


def pages(data: bytes) -> list[Page]:
    """The pages of a TIFF file, at most MOST_PAGES; those behind damage are missing."""
    return list(_pages(data))


def full_page(found: list[Page]) -> Page:
    """The page to label: the first of the largest that are no thumbnails and no masks."""
    whole = [page for page in found if not page.reduced] or found
    return max(whole, key=lambda page: (page.width * page.height, -page.index))


def check_layout(page: Page) -> None:
    """Raise ImageError `unsupported` unless Pillow reads the samples right."""
    problem = _problem(page)
    if problem is not None:
        raise ImageError("unsupported", f"TIFF: {problem} ({page})")


def _problem(page: Page) -> str | None:
    """What Pillow would not read right, the first of them."""
    compression = _COMPRESSIONS.get(page.compression, f"number {page.compression}")
    depths = set(page.bits)
    checks = (
        (page.compression in _READ, f"compression {compression} is not read"),
        (page.sample_format == 1, "only unsigned integers have an agreed range; convert to 8 or 16 bits"),
        (len(depths) == 1 and depths <= {1, 2, 4, 8, 12, 16}, "samples of this size have no agreed range"),
        (page.photometric in (0, 1, 2, 3, 5, 6), "colours of this kind are not read; convert to RGB"),
        (max(depths) <= 8 or _deep_is_read(page), "at this depth only grey and contiguous RGB or CMYK are read"),
    )
    return next((problem for fine, problem in checks if not fine), None)


def _deep_is_read(page: Page) -> bool:
    """Whether samples of 12 or 16 bits come out right."""
    grey = page.samples == 1 and page.photometric in (0, 1)
    colour = page.photometric in (2, 5) and page.planar == 1 and page.top == 0xFFFF
    return grey or colour


def _pages(data: bytes) -> Iterator[Page]:
    handle = io.BytesIO(data)
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2] == 43 or data[3] == 43 else 8])
    place, seen = tags.next, set[int]()
    while place and place not in seen and len(seen) < MOST_PAGES:
        seen.add(place)
        handle.seek(place)
        tags.next = 0  # stays, if the directory is damaged
        tags.load(handle)
        if _WIDTH not in tags or _HEIGHT not in tags:
            return
        yield _page(len(seen) - 1, tags)
        place = tags.next


def _page(index: int, tags: Any) -> Page:
    def number(tag: int, default: int) -> int:
        value = tags.get(tag, default)
        return int(value[0] if isinstance(value, tuple) else value)

    samples = number(_SAMPLES, 1)
    bits = tags.get(_BITS, (1,))
    bits = tuple(map(int, bits if isinstance(bits, tuple) else (bits,)))
    subfile = number(_SUBFILE, 0)
    formats = tags.get(_FORMAT, (1,))
    formats = formats if isinstance(formats, tuple) else (formats,)
    return Page(
        index=index,
        width=number(_WIDTH, 0),
        height=number(_HEIGHT, 0),
        bits=bits,
        samples=samples,
        sample_format=next((int(value) for value in formats if value != 1), 1),
        photometric=number(_PHOTOMETRIC, 0),
        planar=number(_PLANAR, 1),
        compression=number(_COMPRESSION, 1),
        reduced=bool(subfile & 5) or number(_OLD_SUBFILE, 0) == 2,
        max_value=number(_MAX_VALUE, 0) or None,
    )
