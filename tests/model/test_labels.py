"""Label maps: bands equal the whole, in bounded memory; confidence summaries."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cliper.model import labels as module
from cliper.model.config import LabelConfig
from cliper.model.labels import presence_scores, segment_scores, upsampling_matrix
from tests.conftest import ROOT
from tests.support import reference

RULES = [
    LabelConfig(presence_threshold=0.3, background_threshold=0.3),
    LabelConfig(presence_threshold=0.5, background_threshold=0.6, normalize_per_class=True),
    LabelConfig(presence_threshold=0.0, background_threshold=0.0),
    LabelConfig(presence_threshold=0.9, background_threshold=0.0, normalize_per_class=True),
    LabelConfig(presence_threshold=0.0, background_threshold=0.001),
    LabelConfig(presence_threshold=0.3, background_threshold=0.3, margin_threshold=0.3),
    LabelConfig(presence_threshold=0.1, background_threshold=0.0, margin_threshold=0.2),
]


def random_scores(classes: int, side: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    refined = torch.rand(classes, side, side, generator=generator)
    return refined, torch.rand(classes, generator=generator)


@settings(max_examples=60, deadline=None, derandomize=True)  # a tie of two classes is no difference
@given(
    classes=st.integers(1, 7),
    side=st.integers(1, 9),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    rule=st.sampled_from(RULES),
    band=st.sampled_from([1, 500, 10**9]),
    seed=st.integers(0, 10**6),
)
def test_bands_equal_the_slow_formula(
    classes: int, side: int, height: int, width: int, rule: LabelConfig, band: int, seed: int
) -> None:
    refined, presence = random_scores(classes, side, seed)
    before, module.BAND_ELEMENTS = module.BAND_ELEMENTS, band
    try:
        found = segment_scores(refined, presence, (height, width), rule)
    finally:
        module.BAND_ELEMENTS = before
    expected = reference.labels(refined, presence, (height, width), rule)
    # Two classes within rounding of each other, or a value on the threshold, may go either way.
    assert (found.labels != expected).mean() <= 1 / max(expected.size, 1) + 1e-3
    assert found.pixels.sum() == height * width
    assert np.array_equal(found.pixels, np.bincount(found.labels.ravel(), minlength=classes + 1))


@pytest.mark.parametrize("on_accelerator", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("classes", [1, 9, 171])
def test_the_presence_gate_holds_without_a_background_threshold(
    classes: int, normalize: bool, on_accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accelerator upsamples the absent classes too (see `_candidates`); this test does the same."""
    if on_accelerator:
        monkeypatch.setattr(module, "_candidates", lambda gated: torch.arange(len(gated)))
    refined, _ = random_scores(classes, 32, seed=classes)
    presence = torch.linspace(0.1, 0.9, classes) if classes > 1 else torch.tensor([0.4])
    rule = LabelConfig(presence_threshold=0.5, background_threshold=0.0, normalize_per_class=normalize)
    found = segment_scores(refined, presence, (60, 80), rule)
    expected = reference.labels(refined, presence, (60, 80), rule)
    assert (found.labels != expected).mean() < 2e-3  # normalised classes peak at the same value, up to rounding
    seen = np.flatnonzero(found.pixels)
    assert all(label == 0 or presence[label - 1] > 0.5 for label in seen)
    assert len(seen) > 1 or classes == 1  # the classes that are present still win somewhere


def test_an_absent_class_loses_where_it_scores_highest() -> None:
    """Presence 0.9 and 0.4, gate 0.5: every pixel where class 2 is stronger goes to class 1 or background."""
    across = torch.linspace(0, 1, 64).expand(1, 64, 64)
    refined = torch.cat([across, across.flip(2)])  # class 1 to the right, class 2 to the left
    presence = torch.tensor([0.9, 0.4])
    rule = LabelConfig(presence_threshold=0.5, background_threshold=0.0)
    found = segment_scores(refined, presence, (64, 64), rule)
    assert found.pixels[2] == 0
    assert found.labels[:, 0].max() == 0
    assert found.labels[:, -1].min() == 1
    nothing = segment_scores(refined, presence, (64, 64), rule.model_copy(update={"presence_threshold": 0.95}))
    assert not nothing.labels.any()
    assert (nothing.confidence, nothing.margin) == (1.0, 1.0)


@pytest.mark.parametrize(("source", "target"), [(1, 5), (4, 4), (6, 500), (64, 375), (9, 3)])
def test_upsampling_matrix_is_interpolate(source: int, target: int) -> None:
    values = torch.rand(1, 1, source, generator=torch.Generator().manual_seed(1))
    expected = F.interpolate(values, size=target, mode="linear", align_corners=False)
    matrix = upsampling_matrix(source, target, torch.device("cpu"))
    torch.testing.assert_close((matrix @ values[0, 0])[None, None], expected, atol=1e-6, rtol=1e-5)


def test_presence_is_the_mean_of_both_peaks() -> None:
    coarse, refined = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 8, 8)
    expected = (coarse.amax(dim=(2, 3)) + refined.amax(dim=(2, 3))) / 2
    torch.testing.assert_close(presence_scores(coarse, refined), expected)


def test_absent_everywhere_is_background_with_full_confidence() -> None:
    refined, _ = random_scores(3, 4)
    found = segment_scores(refined, torch.zeros(3), (10, 12), RULES[0])
    assert not found.labels.any()
    assert found.confidence == 1.0
    assert np.isnan(found.class_confidence[1:]).all()


def test_confidence_summary_equals_the_pixels() -> None:
    """One class, a ramp from 0 to 1: every summary can be computed by hand."""
    ramp = torch.linspace(0, 1, 1000).view(1, 1, 1000)
    found = segment_scores(
        ramp, torch.ones(1), (1, 1000), LabelConfig(presence_threshold=0, background_threshold=0.5)
    )
    inside = ramp[0, 0].numpy()[found.labels[0] == 1]
    assert found.pixels.tolist() == [500, 500]
    assert found.class_confidence[1] == pytest.approx(inside.mean(), abs=1e-3)
    assert found.class_confidence_p10[1] == pytest.approx(np.quantile(inside, 0.1), abs=2e-3)
    assert found.class_margin[1] == pytest.approx(inside.mean(), abs=1e-3)
    background = 1 - ramp[0, 0].numpy()[found.labels[0] == 0]
    assert found.class_confidence[0] == pytest.approx(background.mean(), abs=1e-3)


def test_many_classes_take_16_bits() -> None:
    refined, presence = random_scores(300, 3)
    found = segment_scores(refined, presence, (20, 20), LabelConfig(presence_threshold=0, background_threshold=0))
    assert found.labels.dtype == np.uint16
    assert found.labels.max() > 255


MEMORY = """
import pathlib, torch
torch.set_num_threads(1)
from cliper.model.config import LabelConfig
from cliper.model.labels import segment_scores
def label(size):
    generator = torch.Generator().manual_seed(0)
    segment_scores(torch.rand(171, 64, 64, generator=generator), torch.ones(171), size, LabelConfig())
label((64, 64))
def peak():  # of this process alone, in KiB; ru_maxrss would include the one that started it
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
label((3000, 4000))
print((peak() - before) // 1024)
"""


def test_twelve_megapixels_with_171_classes_stay_small() -> None:
    """The K x H x W float stack would be 8.2 GB; the label map itself is 12 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150  # MB
