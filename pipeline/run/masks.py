"""Lossless codecs for label maps. Add one by adding to MASK_CODECS."""

import io
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class MaskCodec:
    """`encode` takes uint8 or uint16 [H, W]; `decode` returns the same array; `needs` are modules of an extra."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes], np.ndarray]
    needs: tuple[str, ...] = ()


def palette() -> list[int]:
    """The PASCAL VOC colors of 256 labels as [r, g, b, r, g, b, ...]: bits of the label spread over channels."""
    colours = []
    for label in range(256):
        rgb, bits = [0, 0, 0], label
        for shift in range(7, -1, -1):
            for channel in range(3):
                rgb[channel] |= (bits >> channel & 1) << shift
            bits >>= 3
        colours += rgb
    return colours


_PALETTE = palette()


def encode_png(labels: np.ndarray) -> bytes:
    """Encode [H, W], with H, W >= 1, as a palette PNG (uint8) or a 16-bit grayscale PNG (uint16)."""
    image = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        image.putpalette(_PALETTE)
    buffer = io.BytesIO()
    # Label maps are runs: zlib's run-length strategy beats its level 1 in time (25%) and size (10 to 30%), and
    # levels that search for matches cost three times as much for a few percent. Numbers: docs/LOG.md.
    image.save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """The inverse of `encode_png`."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.array(image, dtype=np.uint8 if image.mode == "P" else np.uint16)


def encode_coco_rle(labels: np.ndarray) -> bytes:
    """JSON {"size": [H, W], "dtype": ..., "rle": {label: COCO compressed RLE}}; label 0 is all other pixels."""
    from pycocotools import mask as coco

    present = [int(label) for label in np.unique(labels) if label]
    rle = {str(k): coco.encode(np.asfortranarray(labels == k))["counts"].decode() for k in present}
    return json.dumps({"size": labels.shape, "dtype": str(labels.dtype), "rle": rle}).encode()


def decode_coco_rle(data: bytes) -> np.ndarray:
    """The inverse of `encode_coco_rle`."""
    from pycocotools import mask as coco

    content = json.loads(data)
    labels = np.zeros(content["size"], dtype=np.uint8 if content["dtype"] == "uint8" else np.uint16)
    for label, counts in content["rle"].items():
        labels[coco.decode({"size": content["size"], "counts": counts.encode()}).astype(bool)] = int(label)
    return labels


MASK_CODECS: dict[str, MaskCodec] = {
    "png": MaskCodec(encode_png, decode_png),
    "coco-rle": MaskCodec(encode_coco_rle, decode_coco_rle, needs=("pycocotools",)),
}


def pack_mask(labels: np.ndarray, codec: str) -> dict[str, Any]:
    """The `mask` and `mask_codec` columns of a label map. Raises KeyError for an unknown codec."""
    return {"mask": {"bytes": MASK_CODECS[codec].encode(labels), "path": None}, "mask_codec": codec}


def unpack_mask(row: Mapping[str, Any]) -> np.ndarray:
    """The label map, uint8 or uint16 [H, W], of a row with the columns `mask` and `mask_codec`."""
    return MASK_CODECS[row["mask_codec"]].decode(row["mask"]["bytes"])
