"""Mask codecs: lossless round trips."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from cliper.pipeline.run.masks import MASK_CODECS, palette

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=30)
LABELS = st.one_of(hnp.arrays(np.uint8, SHAPES), hnp.arrays(np.uint16, SHAPES))


@pytest.mark.parametrize("name", sorted(MASK_CODECS))
@settings(max_examples=80, deadline=None)
@given(labels=LABELS)
def test_round_trip(name: str, labels: np.ndarray) -> None:
    codec = MASK_CODECS[name]
    back = codec.decode(codec.encode(labels))
    assert back.dtype == labels.dtype
    assert np.array_equal(back, labels)


def test_png_is_what_viewers_expect() -> None:
    """A palette PNG in VOC colours: label 1 is dark red, 15 (person) is a pale pink."""
    labels = np.array([[0, 1, 15]], np.uint8)
    with Image.open(io.BytesIO(MASK_CODECS["png"].encode(labels))) as image:
        assert image.mode == "P"
        assert np.array(image.convert("RGB"))[0].tolist() == [[0, 0, 0], [128, 0, 0], [192, 128, 128]]
    assert palette()[3 * 20 : 3 * 21] == [0, 64, 128]


def test_coco_rle_is_read_by_pycocotools() -> None:
    import json

    from pycocotools import mask as coco

    labels = np.zeros((7, 9), np.uint8)
    labels[2:5, 3:8] = 4
    content = json.loads(MASK_CODECS["coco-rle"].encode(labels))
    rle = {"size": content["size"], "counts": content["rle"]["4"].encode()}
    assert coco.area(rle) == 15
    assert coco.toBbox(rle).tolist() == [3, 2, 5, 3]
