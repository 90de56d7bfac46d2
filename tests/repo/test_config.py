"""Settings: every shipped config is valid, and every mistake is one message that names file, key and choices."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cliper.jobs.options import with_preset
from cliper.model.classes import ClassList
from cliper.model.errors import ClassListError, CliperError, ConfigError
from cliper.pipeline.config import JobConfig, classes_for, describe_classes, load_classes, load_config, shipped
from cliper.pipeline.evaluate.benchmarks import load_benchmark
from cliper.pipeline.label.segmenters import chosen


@pytest.mark.parametrize("name", sorted(shipped("label")))
def test_shipped_configs_load(name: str) -> None:
    config = load_config(name)
    chosen(config)
    if config.segmenter == "cliper":
        assert ("clip-only" in name or "dino" in name) == (config.cliper.fgc is None)


def test_shipped_sweeps_load() -> None:
    assert [sorted(load_benchmark(str(path)).variants) for path in shipped("sweeps").values()] == [
        ["both", "dino", "fgc", "neither", "proxy"]
    ]


def test_every_backbone_has_both_forms() -> None:
    assert {f"vit-{b}{form}" for b in ("b-16", "l-14", "h-14") for form in ("", "-clip-only")} <= set(
        shipped("label")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "unknown key 'modle'; allowed here: segmenter, batch_size, dtype, model, input"),
        (
            "model: {fusion: {short_sid: 3}}",
            "unknown key 'model.fusion.short_sid'; allowed here: short_side, attention",
        ),
        ("model: {fgc: {stepz: 3}}", "unknown key 'model.fgc.stepz'; allowed here: model, revision, layers"),
        ("model: {fusion: {attention: best}}", "model.fusion.attention: Input should be 'fused', 'qq'"),
        ("model: {fusion: {short_side: -1}}", "model.fusion.short_side: Input should be greater than 0 .got -1."),
        (
            "model: {labels: {presence_threshold: 2}}",
            "presence_threshold: Input should be less than or equal to 1",
        ),
        ("model: {fgc: {step_index: 50}}", "step_index 50 must be below steps 50"),
        ("model: {fgc: {resolution: 500}}", "resolution 500 must be a multiple of 64"),
        ("model: {fgc: {layers: []}}", "layers is empty"),
        ("model: {sliding: {crop: 100, stride: 200}}", "stride 200 is larger than crop 100"),
        ("model: {backbone: {model: ViT-B-16}}", "weights are needed for 'ViT-B-16'"),
        ("model: {backbone: {model: 'embedded:tiny', weights: openai}}", "weights must be empty"),
        ("model: {prompts: {templates: [no placeholder]}}", "templates need exactly one {}"),
        ("- a list", "must be a mapping of settings, not list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(str(file))
    assert str(file) in str(caught.value)


def test_unknown_names_list_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="shipped config; did you mean vit-l-14.* shipped: .*tiny"):
        load_config("vit-xl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: write one class name per line"),
        ("cat\n\ndog\n", "line 2 is blank"),
        ("cat\ndog\ncat\n", "'cat' is listed twice"),
        ("cat =\n", "line 1 is 'cat ='; expected"),
        ("= a cat\n", "expected 'name'"),
    ],
)
def test_wrong_class_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text)
    with pytest.raises(ClassListError, match=message) as caught:
        load_classes(str(file))
    assert str(file) in str(caught.value)


def test_class_files_take_prompts_comments_and_any_language(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("# animals\ncat\ndog = a dog, a puppy\n猫\n", encoding="utf-8-sig")
    assert load_classes(str(file)) == ClassList(("cat", "dog", "猫"), ("cat", "a dog, a puppy", "猫"))


def test_binary_class_file(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_bytes(b"\xff\xfe\x00caf\xe9")
    with pytest.raises(ClassListError, match="is not UTF-8 text"):
        load_classes(str(file))


THREE = ("cat", "dog", "tree")


@pytest.mark.parametrize(
    "text",
    [
        "cat,dog,tree",
        "cat, dog, tree\n\n",
        "cat\tdog\ttree\n",
        "cat; dog; tree",
        '["cat", "dog", "tree"]',
        '[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "tree"}]',
        '{"0": "cat", "1": "dog", "2": "tree"}',
        "- cat\n- dog\n- 'tree'\n",
        "0: cat\n1: dog\n2: tree\n",
        "1\tcat\n2\tdog\n3\ttree\n",
        "1,cat\n2,dog\n3,tree\n",
        "1 cat\n2 dog\n3 tree\n",
        "1. cat\n2. dog\n3. tree\n",
        "1) cat\n2) dog\n3) tree\n",
        "* cat\n* dog\n* tree\n",
        '"cat"\n"dog"\n\'tree\'\n',
        "'cat', 'dog', 'tree'\n",
        "\ufeffcat\ndog\u200b\ntree\u00a0\n",
        "# animals\ncat\n  # and\ndog # a pet\ntree\n\n  \n",
        "cat\r\ndog\r\ntree\r\n",
    ],
)
def test_common_forms_of_class_files_are_one_list(tmp_path: Path, text: str) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text, encoding="utf-8", newline="")
    assert load_classes(str(file)) == ClassList(THREE, THREE)


def test_names_that_begin_with_numbers_out_of_order_are_names(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("2 door car\n4 door car\n")
    assert load_classes(str(file)).names == ("2 door car", "4 door car")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat, kitty\ndog, puppy\n", "class 1 would be 'cat, kitty', with a comma.*'cat = cat; kitty'"),
        ("cat\tanimal\ndog\tanimal\n", "with a tab"),
        ("1: cat\n5: dog\n", "read as numbered classes, but the numbers are 1, 5"),
        ("- cat\ndog\n", "only some lines"),
        ("[cat, dog]", "read as JSON because of its first character"),
        ('{"cat": 1}', "read as JSON, but not a list"),
        ("[1, 2]", "1 is not a class name in quotes"),
        ("c\0a\0t\0", "holds null characters: it is no UTF-8 text"),
        ("<html>\n", "class 1 would be '<html>': write the name alone"),
        ("item {\n  id: 1\n  name: 'cat'\n}\n", "class 1 would be 'item {'"),
        ("- cat: a cat\n- dog\n", "class 1 would be 'cat: a cat'.*'name = word; word'"),
        ("n02124075 Egyptian cat\nn02123045 tabby\n", "class 1 would be 'n02124075 Egyptian cat'"),
        ("x" * 201, "class 1 has 201 characters, a name at most 200"),
    ],
)
def test_ambiguous_class_files_are_refused_with_the_form_they_were_read_as(
    tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text)
    with pytest.raises(ClassListError, match=words):
        load_classes(str(file))


@pytest.mark.parametrize("name", sorted(shipped("classes")))
def test_shipped_class_lists_are_read_line_by_line(name: str) -> None:
    lines = shipped("classes")[name].read_text(encoding="utf-8").splitlines()
    assert load_classes(name) == ClassList.parse(lines)


def test_real_weights_need_classes() -> None:
    assert classes_for(None, JobConfig()) == load_classes("tiny")
    with pytest.raises(ConfigError, match="--classes is needed: ViT-L-14"):
        classes_for(None, load_config("vit-l-14"))
    assert classes_for("voc21", load_config("vit-l-14")) == load_classes("voc21")
    assert describe_classes(load_classes("tiny")).startswith("19: ")


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=80))
def test_random_class_text_parses_or_is_refused(text: str) -> None:
    try:
        found = ClassList.parse(text.splitlines())
    except ClassListError:
        return
    assert len(set(found.names)) == len(found) > 0


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_random_yaml_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "random.yaml"
    file.write_text(text, encoding="utf-8")
    try:
        loaded = load_config(str(file))
    except CliperError:
        return
    assert not yaml.safe_load(text), "only nothing, in one of YAML's ways to write it, may pass"
    assert loaded == JobConfig()


def test_presets_change_the_model_and_nothing_else() -> None:
    config = load_config("vit-l-14")
    assert with_preset(config, "exact") == config
    assert with_preset(config, "clip-only").model == config.model.model_copy(update={"fgc": None})
    fast = with_preset(config, "fast")
    assert (fast.model.dtype, fast.model.fusion.sinkhorn) == ("bfloat16", "converged")
    assert fast.model.fgc == config.model.fgc
    with pytest.raises(ConfigError, match="unknown preset 'turbo'; there is: exact, fast, fast-384"):
        with_preset(config, "turbo")
