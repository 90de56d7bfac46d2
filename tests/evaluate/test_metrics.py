"""Counts and ratios against torchmetrics and a slow, obvious implementation."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate import bootstrap, boundary, metrics


def slow_confusion(truth, prediction, classes, ignore):
    matrix = np.zeros((classes + 1, classes + 2), dtype=np.int64)
    for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if t not in ignore:
            matrix[t, p if p <= classes else classes + 1] += 1
    return matrix


def slow_scores(matrix, protocol, ignore):
    """IoU, accuracy and their means with Python integers, one class at a time."""
    size = len(matrix)
    ious, counted, accuracies, weighted, total = {}, [], [], 0.0, int(matrix.sum())
    for c in range(size):
        tp, fn = int(matrix[c, c]), int(matrix[c].sum() - matrix[c, c])
        fp = sum(int(matrix[r, c]) for r in range(size) if r != c)
        if tp + fn + fp:
            ious[c] = tp / (tp + fn + fp)
        if tp + fn:
            accuracies.append(tp / (tp + fn))
            weighted += (tp + fn) / total * ious[c]
        if c not in ignore and (tp + fn if protocol == "cliper" else tp + fn + fp):
            counted.append(ious[c])
    return {
        "miou": sum(counted) / len(counted),
        "pixel_accuracy": sum(int(matrix[c, c]) for c in range(size)) / total,
        "mean_accuracy": sum(accuracies) / len(accuracies),
        "frequency_weighted_iou": weighted,
    }


def dense(part, classes):
    return metrics.add(metrics.empty(classes), [part])


def random_maps(seed, classes, dtype, high, shape=(23, 31)):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes + 1, shape).astype(dtype)
    if classes != 255:  # if all 256 labels are in use, none is left to ignore
        truth[rng.random(shape) < 0.1] = np.iinfo(dtype).max
    return truth, rng.integers(0, high, shape).astype(dtype)


CASES = [
    pytest.param(20, np.uint8, 21, (255,), id="voc21"),
    pytest.param(20, np.uint8, 21, (0, 255), id="voc20"),
    pytest.param(171, np.uint8, 256, (0, 255), id="predictions outside the list"),
    pytest.param(700, np.uint16, 701, (65_535,), id="uint16"),
    pytest.param(700, np.uint16, 65_536, (0, 65_535), id="uint16, any prediction"),
    pytest.param(255, np.uint8, 256, (), id="the whole of uint8"),
]


@pytest.mark.parametrize(("classes", "dtype", "high", "ignore"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_counts_equal_the_slow_implementation(classes, dtype, high, ignore, seed):
    truth, prediction = random_maps(seed, classes, dtype, high)
    part = metrics.image_confusion(truth, prediction, classes, ignore)
    expected = slow_confusion(truth, prediction, classes, ignore)
    assert np.array_equal(dense(part, classes), expected)
    assert np.array_equal(metrics.image_totals(part, classes), metrics.confusion_totals(expected))
    for protocol in metrics.PROTOCOLS:
        ours, slow = metrics.score(expected, protocol, ignore), slow_scores(expected, protocol, ignore)
        for name, value in slow.items():
            assert getattr(ours, name) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("ignore_background", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equals_torchmetrics(seed, ignore_background):
    importlib.import_module(
        "cliper.model._libraries"
    )  # torchmetrics needs torchvision, which this makes importable
    from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

    classes = 12
    truth, prediction = random_maps(seed, classes, np.uint8, classes - 2)  # two classes are never predicted
    truth[truth == 3] = 4  # and one is absent from the truth, but predicted
    keep = (truth != 255) & (~np.logical_and(truth == 0, ignore_background))
    ignore = (0, 255) if ignore_background else (255,)
    matrix = dense(metrics.image_confusion(truth, prediction, classes, ignore), classes)
    t, p = (torch.from_numpy(a.astype(np.int64)) for a in (truth[keep], prediction[keep]))
    theirs = multiclass_confusion_matrix(p, t, num_classes=classes + 1)
    assert np.array_equal(matrix[:, :-1], theirs.numpy())
    assert not matrix[:, -1].any()
    jaccard = multiclass_jaccard_index(p, t, num_classes=classes + 1, average="none").double().numpy()
    scores = metrics.score(matrix, "mmseg", ignore)
    present = ~np.isnan(scores.iou)
    np.testing.assert_allclose(scores.iou[present], jaccard[present], atol=1e-6)  # torchmetrics divides in float32
    exact = np.diag(theirs.numpy()) / (theirs.sum(0) + theirs.sum(1) - theirs.diag()).double().numpy()
    np.testing.assert_allclose(scores.iou[present], exact[present], rtol=0, atol=1e-12)
    assert scores.pixel_accuracy == pytest.approx(float((t == p).double().mean()), abs=1e-12)


def test_the_protocols_differ_exactly_in_classes_that_are_only_predicted():
    truth = np.array([[1, 1, 2, 2]], dtype=np.uint8)
    prediction = np.array([[1, 1, 2, 3]], dtype=np.uint8)
    matrix = dense(metrics.image_confusion(truth, prediction, 3), 3)
    assert metrics.score(matrix, "cliper").miou == pytest.approx((1 + 0.5) / 2)
    assert metrics.score(matrix, "mmseg").miou == pytest.approx((1 + 0.5 + 0) / 3)


def test_a_background_prediction_is_wrong_but_no_class_where_background_is_ignored():
    truth = np.array([[1, 1, 0, 0]], dtype=np.uint8)
    prediction = np.array([[1, 0, 0, 1]], dtype=np.uint8)
    scores = metrics.score(dense(metrics.image_confusion(truth, prediction, 1, (0, 255)), 1), "mmseg", (0, 255))
    assert (scores.miou, scores.counted.tolist()) == (0.5, [False, True])


def test_an_image_of_ignored_pixels_counts_nothing_and_has_no_mean():
    truth = np.full((4, 5), 255, dtype=np.uint8)
    part = metrics.image_confusion(truth, np.ones_like(truth), 3)
    assert len(part.cells) == 0
    scores = metrics.score(dense(part, 3), "mmseg")
    assert all(np.isnan(v) for v in (scores.miou, scores.pixel_accuracy, scores.frequency_weighted_iou))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 40))
def test_merging_does_not_depend_on_order_or_grouping(seed, groups, images):
    rng = np.random.default_rng(seed)
    maps = rng.integers(0, 5, (images, 2, 3, 4)).astype(np.uint8)
    parts = [metrics.image_confusion(t, p, 4) for t, p in maps]
    whole = metrics.add(metrics.empty(4), parts)
    shuffled = [parts[i] for i in rng.permutation(images)]
    shards = [metrics.add(metrics.empty(4), shuffled[g::groups]) for g in range(groups)]
    assert np.array_equal(whole, sum(shards))
    assert whole.dtype == np.int64
    assert whole.sum() == images * 12


def test_counts_beyond_32_bits_are_exact():
    part = metrics.SparseConfusion(np.array([0, 5]), np.array([2**40 + 1, 3]))
    matrix = metrics.add(metrics.empty(2), [part] * 5)
    assert matrix.sum() == 5 * (2**40 + 4)


def test_truth_outside_the_list_and_other_sizes_are_refused():
    truth = np.full((2, 2), 9, dtype=np.uint8)
    with pytest.raises(EvaluationError, match=r"label 9; allowed are 0 to 3 .*'cliper prepare'"):
        metrics.image_confusion(truth, np.zeros_like(truth), 3)
    with pytest.raises(EvaluationError, match="2x3 pixels but the ground truth 2x2"):
        metrics.image_confusion(truth, np.zeros((2, 3), np.uint8), 9)
    with pytest.raises(EvaluationError, match="unknown protocol 'voc'; allowed: cliper, mmseg"):
        metrics.score(metrics.empty(2), "voc")


def slow_band(labels, distance):
    """Erosion of every region by scipy, the image's border being a contour."""
    band = np.zeros(labels.shape, dtype=bool)
    square = np.ones((2 * distance + 1, 2 * distance + 1), dtype=bool)
    for label in np.unique(labels):
        region = labels == label
        band |= region & ~ndimage.binary_erosion(region, square, border_value=0)
    return band


@pytest.mark.parametrize("shape", [(40, 57), (7, 90), (1, 1), (64, 64)])
@pytest.mark.parametrize("distance", [1, 2, 3, 5, 12])
def test_the_contour_band_equals_erosion(shape, distance):
    rng = np.random.default_rng(distance)
    coarse = rng.integers(0, 4, (shape[0] // 8 + 1, shape[1] // 8 + 1)).astype(np.uint16)
    labels = np.kron(coarse, np.ones((8, 8), np.uint16))[: shape[0], : shape[1]]
    assert np.array_equal(boundary.contour_band(labels, distance), slow_band(labels, distance))


def test_boundary_counts_equal_the_definition():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 4, (12, 14)).astype(np.uint8)
    truth = np.kron(coarse, np.ones((9, 9), np.uint8))
    prediction = np.roll(truth, 2, axis=1)
    prediction[5:30, 5:30] = 9  # outside the list: dropped
    keep = truth != 3
    found = boundary.boundary_counts(truth, prediction, keep, 3)
    distance = boundary.band_width(truth.shape)
    bands = slow_band(truth, distance) & keep, slow_band(prediction, distance) & keep
    for c, intersection, union in zip(
        *(a.tolist() for a in (found.classes, found.intersection, found.union)), strict=True
    ):
        t, p = bands[0] & (truth == c), bands[1] & (prediction == c)
        assert (intersection, union) == ((t & p).sum(), (t | p).sum())
    assert found.classes.tolist() == [0, 1, 2, 3]


def test_bootstrap_is_reproducible_and_covers():
    rng = np.random.default_rng(1)
    parts = [metrics.image_confusion(t, np.where(rng.random(t.shape) < 0.7, t, 1).astype(np.uint8), 3)
             for t in rng.integers(0, 4, (60, 8, 8)).astype(np.uint8)]  # fmt: skip
    totals = np.stack([metrics.image_totals(part, 3) for part in parts])
    miou = metrics.score(metrics.add(metrics.empty(3), parts), "cliper").miou
    values = bootstrap.drawn_miou(totals, "cliper", (255,))
    assert np.array_equal(values, bootstrap.drawn_miou(totals, "cliper", (255,)))
    interval = bootstrap.interval(values)
    assert interval.low < miou < interval.high
    assert interval.high - interval.low < 0.1
    same = bootstrap.difference(totals, totals, "cliper", (255,))
    assert (same.miou, same.interval.low, same.interval.high, same.share_better) == (0, 0, 0, 0)
    worse = totals.copy()
    worse[:, 0] = worse[:, 0] * 9 // 10
    fell = bootstrap.difference(totals, worse, "cliper", (255,))
    assert fell.interval.high < 0 and fell.share_better == 0


def test_one_image_has_an_interval_of_one_point():
    part = metrics.image_confusion(np.array([[0, 1]], np.uint8), np.array([[0, 0]], np.uint8), 1)
    values = bootstrap.drawn_miou(metrics.image_totals(part, 1)[None], "cliper", (255,))
    assert set(values.tolist()) == {0.25}
