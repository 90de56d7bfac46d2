"""The embedded model gives the same masks, bit for bit, with 1, 2 and 4 CPU threads; scores agree closely."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cliper.model import CLIPer, CLIPerConfig
from cliper.pipeline.config import load_classes, load_config
from tools.scenes import make_scene

THREADS = (1, 2, 4)
SCENES = 1


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_masks_do_not_depend_on_the_number_of_threads(threads_restored: None) -> None:
    model = load_config("tiny").model
    assert isinstance(model, CLIPerConfig)
    segmenter = CLIPer.load(model, load_classes("tiny"), "cpu")
    images = [make_scene(900, i).image for i in range(SCENES)]
    ids = [f"{i}.png" for i in range(len(images))]
    found = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        found[threads] = segmenter.segment(images, ids)
    for threads in THREADS[1:]:
        for one, other in zip(found[1], found[threads], strict=True):
            assert np.array_equal(one.labels, other.labels)
            assert np.array_equal(one.pixels, other.pixels)
            np.testing.assert_allclose(one.class_confidence, other.class_confidence, atol=1e-4)
            np.testing.assert_allclose(one.presence, other.presence, atol=1e-4)
            assert abs(one.confidence - other.confidence) < 1e-4
