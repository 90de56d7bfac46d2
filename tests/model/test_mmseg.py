"""The mmseg protocol: several words per class, probabilities instead of gates, background as a class."""

import numpy as np
import pytest
import torch

from cliper.model.classes import ClassList
from cliper.model.config import BackboneConfig, CLIPerConfig, FusionConfig, LabelConfig, PromptConfig
from cliper.model.errors import ClassListError
from cliper.model.fusion import class_scores
from cliper.model.labels import segment_scores


def test_words_of_a_class():
    classes = ClassList.parse(["person = person | man in suit; body", "car"])
    assert classes.words == (("person", "man in suit", "body"), ("car",))
    with pytest.raises(ClassListError, match="line 1 is 'person = man ;'.*'name = word; word'"):
        ClassList.parse(["person = man ;"])


def test_a_class_scores_by_its_best_word():
    logits = torch.randn(2, 1, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    scores = class_scores(logits, 3, [2, 1, 2])
    every = logits.softmax(dim=2)  # the sixth vector is a distractor
    slow = torch.stack(
        [
            torch.maximum(every[:, :, 0], every[:, :, 1]),
            every[:, :, 2],
            torch.maximum(every[:, :, 3], every[:, :, 4]),
        ],
        dim=2,
    )
    assert torch.equal(scores, slow)
    assert torch.equal(class_scores(logits, 5, [1] * 5), class_scores(logits, 5))


def slow_labels(scores, size, threshold, background_plane):
    """Upsample, divide by the sum over the classes, take the best: pixel by pixel."""
    up = torch.nn.functional.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0].numpy()
    labels = np.zeros(size, dtype=np.uint8)
    for y in range(size[0]):
        for x in range(size[1]):
            share = up[:, y, x] / up[:, y, x].sum()
            best = int(share.argmax())
            is_background = background_plane and best == len(scores) - 1
            labels[y, x] = 0 if is_background or share[best] < threshold else best + 1
    return labels


@pytest.mark.parametrize("background_plane", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_the_decision_is_the_largest_share(background_plane, threshold):
    scores = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(3)) ** 2
    config = LabelConfig(protocol="mmseg", probability_threshold=threshold)
    found = segment_scores(scores, torch.ones(5), (23, 31), config, background_plane)
    expected = slow_labels(scores, (23, 31), threshold, background_plane)
    assert np.array_equal(found.labels, expected)
    assert len(found.presence) == 5 - background_plane
    assert found.pixels.tolist() == np.bincount(expected.ravel(), minlength=6 - background_plane).tolist()
    assert (0 in expected) == (background_plane or threshold > 0)  # else the choice is forced
    assert 0 <= found.confidence <= 1


def config(tiny_clip, **labels):
    return CLIPerConfig(
        backbone=BackboneConfig(model=f"local-dir:{tiny_clip}"),
        prompts=PromptConfig(templates=("a {}",), background_words=("wall", "sky"), mean_class=False),
        fusion=FusionConfig(short_side=112),
        labels=LabelConfig(protocol="mmseg", **labels),
        fgc=None,
    )


def test_background_words_are_a_separate_class(tiny_clip, photos):
    from cliper.model import CLIPer

    model = CLIPer.load(config(tiny_clip), ClassList.parse(["cat = cat | tabby", "cup"]))
    assert (model.words, model.classes, len(model.text)) == ((2, 1, 2), 3, 5)
    [found] = model.segment([photos[0][:160, :200]], ["a"])
    assert found.labels.shape == (160, 200)
    assert set(np.unique(found.labels).tolist()) <= {0, 1, 2}
    assert len(found.presence) == 2


def test_without_synonyms_the_labels_are_unchanged(tiny_clip, photos):
    from cliper.model import CLIPer

    official = config(tiny_clip).model_copy(update={"labels": LabelConfig(background_threshold=0.3)})
    model = CLIPer.load(official, ClassList.parse(["cat", "cup"]))
    assert (model.words, model.classes, model.background_plane) == ((), 2, False)


def test_the_mean_class_has_no_place_here(tiny_clip):
    with pytest.raises(ValueError, match="set prompts.mean_class to false"):
        CLIPerConfig(labels=LabelConfig(protocol="mmseg"))


def test_a_narrow_lead_is_background():
    shares = torch.tensor([0.9, 0.6, 0.5, 0.34])  # of the first of two classes, pixel by pixel
    scores = torch.stack([shares, 1 - shares])[:, None]  # [2, 1, 4]
    for threshold in (0.0, 0.3, 0.6):
        settings = LabelConfig(protocol="mmseg", margin_threshold=threshold)
        found = segment_scores(scores, torch.ones(2), (1, 4), settings)
        expected = []
        for share in shares.tolist():
            best, second = max(share, 1 - share), min(share, 1 - share)
            clear = best * (best - second) ** 0.5 >= threshold**1.25
            expected.append((1 if share >= 0.5 else 2) if clear else 0)
        assert found.labels[0].tolist() == expected
    assert found.margin > 0
    assert "margin_threshold" not in LabelConfig().model_dump()
