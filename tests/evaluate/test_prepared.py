"""The shipped benchmark settings and class lists: complete, valid, and those of the official evaluation."""

import pytest

from cliper.model.errors import ConfigError
from cliper.pipeline.config import load_classes
from cliper.pipeline.errors import DatasetError, EvaluationError
from cliper.pipeline.evaluate.benchmarks import load_benchmark, merged, shipped_benchmarks
from cliper.pipeline.evaluate.registry import DATASETS, find_dataset

CLASSES = {"voc21": 20, "voc20": 20, "context60": 59, "context59": 59, "coco_object": 80, "coco_stuff": 171,
           "ade20k": 150, "cityscapes": 19}  # fmt: skip
NAMES = [name for name, _ in shipped_benchmarks()]


def test_eight_benchmarks_two_backbones_two_protocols():
    assert sorted(NAMES) == sorted(f"{b}-{k}{p}" for b in CLASSES for k in ("b16", "l14") for p in ("", "-mmseg"))
    assert set(DATASETS) == {*CLASSES, "folder"}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_is_complete(name):
    config = load_benchmark(name)
    assert len(load_classes(config.classes)) == CLASSES[config.benchmark]
    assert load_classes(config.classes).names == load_classes(DATASETS[config.benchmark].classes).names
    if config.protocol == "cliper":
        assert set(config.published_miou) == set(config.variants)
        assert all(15 < value < 95 for value in config.published_miou.values())
    else:
        assert not config.published_miou
    for variant in config.variants:
        settings = config.settings(variant)
        assert ("without-fgc" in variant) == (settings.fgc is None)
        assert ("sliding" in variant) == (settings.sliding is not None)
        assert settings.backbone.weights == "openai"
        assert (
            settings.backbone.model
            == {"b16": "ViT-B-16-quickgelu", "l14": "ViT-L-14-quickgelu"}[name.split("-")[1]]
        )


# Short side, layer, scale, attention, presence, background, normalised; published whole and sliding with FGC.
OFFICIAL = {
    "voc21-b16": (336, -1, 100, 0.1, 0.7, 0.6, True, 66.4, 66.5),
    "voc21-l14": (336, -2, 50, 0.1, 0.5, 0.4, True, 71.6, 72.2),
    "voc20-b16": (336, -1, 100, 0.1, 0.0, 0.001, False, 85.5, 86.0),
    "voc20-l14": (336, -1, 70, 0.2, 0.1, 0.0001, False, 90.3, 89.8),
    "context60-b16": (336, -1, 100, 0.2, 0.45, 0.45, False, 37.5, 38.3),
    "context60-l14": (336, -2, 50, 0.2, 0.3, 0.3, False, 39.0, 39.5),
    "context59-b16": (336, -1, 100, 0.2, 0.3, 0.3, False, 41.6, 42.4),
    "context59-l14": (336, -2, 100, 0.2, 0.45, 0.45, False, 44.0, 44.6),
    "coco_object-b16": (336, -1, 50, 0.2, 0.3, 0.3, False, 39.2, 40.0),
    "coco_object-l14": (336, -2, 50, 0.1, 0.5, 0.5, False, 44.4, 44.7),
    "coco_stuff-b16": (336, -1, 50, 0.2, 0.1, 0.1, False, 27.6, 28.6),
    "coco_stuff-l14": (336, -2, 50, 0.2, 0.2, 0.2, False, 29.7, 30.4),
    "ade20k-b16": (336, -1, 100, 0.2, 0.3, 0.3, False, 21.5, 22.0),
    "ade20k-l14": (336, -1, 50, 0.2, 0.2, 0.2, False, 24.5, 25.0),
    "cityscapes-b16": (560, -1, 100, 0.35, 0, 0.0001, False, 37.0, 38.7),
    "cityscapes-l14": (448, -1, 100, 0.35, 0, 0.0001, False, 41.6, 42.5),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_settings(name):
    config, settings = load_benchmark(name), load_benchmark(name).settings("whole")
    fusion, labels = settings.fusion, settings.labels
    ours = (fusion.short_side, fusion.select_layer, fusion.logit_scale, fusion.attention_threshold,
            labels.presence_threshold, labels.background_threshold, labels.normalize_per_class,
            config.published_miou["whole"], config.published_miou["sliding"])  # fmt: skip
    assert ours == OFFICIAL[name]
    assert settings.fgc.layers == (-4, -6)
    sliding = config.settings("sliding")
    assert (sliding.sliding.crop, sliding.sliding.stride) == (336 if name.startswith("voc") else 224, 112)
    changed = {"context60-l14": 0.2, "coco_object-l14": 0.4}
    assert sliding.labels.background_threshold == changed.get(name, labels.background_threshold)


# Scale, presence, background, normalised; published in the paper's first version.
FIRST_VERSION = {
    "voc21-b16": (100, 0.7, 0.6, False, 65.9),
    "voc21-l14": (50, 0.5, 0, True, 69.8),
    "voc20-b16": (100, 0, 0.001, False, 85.2),
    "voc20-l14": (50, 0, 0.0001, False, 90.0),
}


@pytest.mark.parametrize("name", FIRST_VERSION)
def test_settings_of_the_first_version(name):
    config, settings = load_benchmark(name), load_benchmark(name).settings("v1")
    fusion, labels = settings.fusion, settings.labels
    ours = (fusion.logit_scale, labels.presence_threshold, labels.background_threshold, labels.normalize_per_class)
    assert (*ours, config.published_miou["v1"]) == FIRST_VERSION[name]
    assert (fusion.combination, fusion.select_layer, fusion.attention_threshold) == ("v1", -1, 0.2)
    assert (settings.fgc.attention_threshold, settings.fgc.layers) == (0.1, (-4, -6))


def test_background_words_and_prompts():
    words = load_benchmark("voc21-b16").settings("whole").prompts.background_words
    assert len(words) == 25 and words[0] == "ground" and words[-1] == "sign"
    classes = load_classes("voc21")
    assert dict(zip(classes.names, classes.prompts, strict=True))["person"] == "person with clothes, people, human"
    assert load_classes("voc20").prompts == classes.prompts
    synonyms = dict(zip(classes.names, load_classes("voc21-mmseg").words, strict=True))
    assert len(synonyms["person"]) == 7 and synonyms["boat"] == ("ship",)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("mmseg")])
def test_the_mmseg_protocol(name):
    config = load_benchmark(name)
    settings = config.settings("sliding")
    assert settings.prompts.templates == "openai80"
    assert settings.fusion.logit_scale == 40
    assert (settings.sliding.crop, settings.sliding.stride) == (224, 112)
    counts_background = 0 not in DATASETS[config.benchmark].ignore_labels
    assert bool(settings.prompts.background_words) == counts_background
    assert (settings.labels.probability_threshold > 0) == counts_background


def test_mistakes_in_a_config_are_named(tmp_path):
    good = {
        "benchmark": "voc21",
        "backbone": "x",
        "protocol": "cliper",
        "classes": "voc21",
        "variants": {"whole": {}},
    }
    import yaml

    for change, message in [
        ({"benchmark": "voc"}, "unknown benchmark 'voc'; did you mean voc21 or voc20"),
        ({"truth": "halves"}, "truth must be one of: class, aug"),
        ({"published_miou": {"other": 1.0}}, "names 'other', which is no variant"),
        ({"protocol": "mmseg"}, "protocol is 'mmseg', but labels.protocol 'cliper'"),
        (
            {"variants": {"whole": {"fusion": {"size": 3}}}},
            "variant 'whole': unknown key 'model.fusion.size'; allowed here: short",
        ),
        ({"thresholds": 1}, "unknown key 'thresholds'; allowed here: benchmark, backbone"),
    ]:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(good | change))
        with pytest.raises(ConfigError, match=message):
            load_benchmark(str(path))
    with pytest.raises(
        EvaluationError, match="unknown variant 'half'; allowed: whole, whole-without-fgc, sliding"
    ):
        load_benchmark("voc21-b16").settings("half")
    with pytest.raises(DatasetError, match="unknown benchmark 'voc'"):
        find_dataset("voc")


def test_merged_replaces_leaves_and_keeps_the_rest():
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert merged(base, {"a": {"c": {"d": 3}}, "e": [2], "f": None}) == {
        "a": {"b": 1, "c": {"d": 3}},
        "e": [2],
        "f": None,
    }
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
