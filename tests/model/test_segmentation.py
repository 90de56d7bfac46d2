"""Statistics of a label map in one place, and the rule for independent probabilities."""

import numpy as np
import pytest
import torch

from cliper.model.config import LabelConfig, SigmoidConfig
from cliper.model.labels import LABEL_RULES, segment_scores
from cliper.model.segmentation import Segmentation

STATISTICS = ("pixels", "class_confidence", "class_confidence_p10", "class_margin")


def test_worked_out_on_paper() -> None:
    labels = np.array([[0, 1], [1, 2]])
    scores = np.array([[[0.2, 0.9], [0.5, 0.1]], [[0.1, 0.3], [0.5, 0.7]]], np.float32)
    found = Segmentation.of(labels, 3, scores=np.concatenate([scores, np.zeros((1, 2, 2), np.float32)]))
    assert found.labels.dtype == np.uint8
    assert found.pixels.tolist() == [1, 2, 1, 0]
    assert found.presence == pytest.approx([0.9, 0.7, 0])
    assert found.class_confidence[:3] == pytest.approx([0.8, 0.7, 0.7], abs=1e-4)
    assert np.isnan(found.class_confidence[3])
    assert found.class_margin[:3] == pytest.approx([0.8, 0.3, 0.6], abs=1e-4)
    assert found.confidence == pytest.approx((0.8 + 0.9 + 0.5 + 0.7) / 4, abs=1e-4)
    assert found.confidence_p10 == pytest.approx(0.5, abs=1 / 1024)


def test_without_scores_every_pixel_is_certain() -> None:
    found = Segmentation.of(np.array([[True, False]]), 1)
    assert (found.confidence, found.confidence_p10, found.margin) == (1, 1, 1)
    assert found.presence.tolist() == [1]
    assert Segmentation.of(np.array([[300]]), 300).labels.dtype == np.uint16


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        (np.array([[4]]), None, "labels go from 0 to 3; found 4 to 4"),
        (np.array([1]), None, r"labels must be integers \[H, W\]"),
        (np.array([[0.5]]), None, "float64"),
        (np.array([[1]]), np.zeros((2, 1, 1)), r"scores must be \(3, 1, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(labels: np.ndarray, scores: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmentation.of(labels, 3, scores=scores)


def test_numpy_counts_what_a_device_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(5, 40, 30, generator=generator)
    rule = LabelConfig(protocol="mmseg", probability_threshold=0.25)
    device = segment_scores(scores, scores.amax(dim=(1, 2)), (40, 30), rule)
    share = scores / scores.sum(dim=0)
    best, second = share.topk(2, dim=0).values.numpy()
    sure = best >= 0.25
    host = Segmentation.of(
        device.labels,
        5,
        confidence=np.where(sure, best, 1 - best),
        margin=np.where(sure, best - second, 0.25 - best),
    )
    for name in STATISTICS:
        assert getattr(host, name) == pytest.approx(getattr(device, name), abs=2e-3, nan_ok=True)
    assert host.confidence == pytest.approx(device.confidence, abs=1e-4)
    assert host.margin == pytest.approx(device.margin, abs=1e-4)


def at(*scores: float, **settings: object) -> tuple[int, float, float]:
    """The label of a pixel with these probabilities, its confidence and margin."""
    found = segment_scores(
        torch.tensor(scores)[:, None, None],
        torch.tensor(scores),
        (1, 1),
        SigmoidConfig.model_validate(settings),
    )
    return int(found.labels[0, 0]), found.confidence, found.margin


def test_independent_probabilities() -> None:
    """By hand: the largest wins from the threshold on; with the margin rule its lead counts as well."""
    assert at(0.3, 0.6, 0.5) == pytest.approx((2, 0.6, 0.1), abs=1e-3)
    assert at(0.3, 0.4) == pytest.approx((0, 0.6, 0.1), abs=1e-3)
    assert at(0.3, 0.4, threshold=0) == pytest.approx((2, 0.4, 0.1), abs=1e-3)
    needed = 0.5**1.25  # 0.4204
    assert at(0.8, 0.6, margin_rule=True)[0] == 0, f"0.8 * sqrt(0.2) = 0.358 < {needed}"
    assert at(0.8, 0.5, margin_rule=True)[0] == 1, f"0.8 * sqrt(0.3) = 0.438 > {needed}"
    assert at(0.8, margin_rule=True)[0] == 1, "one class has no rival"


def test_rules_are_named() -> None:
    assert sorted(LABEL_RULES) == ["cliper", "mmseg", "sigmoid"]
