"""The seam: a segmenter brings its own settings; batch size and dtype are the job's; 0.1's files still load."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cliper.jobs.options import Resources, with_overrides, with_preset
from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig, Settings
from cliper.model.errors import ConfigError
from cliper.model.segmentation import Segmentation
from cliper.pipeline.config import JobConfig, changed, classes_for, load_classes, load_config, validate
from cliper.pipeline.evaluate.benchmarks import load_benchmark
from cliper.pipeline.evaluate.sweep import make_grid
from cliper.pipeline.label.job import open_job
from cliper.pipeline.label.segmenters import SEGMENTERS, SegmenterKind, chosen
from cliper.pipeline.run.failed import stored_settings
from cliper.pipeline.run.folder import fingerprint, identity_of, read_run
from cliper.pipeline.storage.backend import Storage
from tests.conftest import ROOT
from tests.support.fakes import write_corpus

RUN_0_1 = ROOT / "tests" / "data" / "run_0_1" / "run"


class ThresholdConfig(Settings):
    threshold: int = 128


class Threshold:
    """Class 1 where the red channel reaches the threshold."""

    def __init__(self, config: JobConfig, classes: ClassList) -> None:
        self.model, self.classes = config.model, len(classes)

    def segment(self, images: Sequence[np.ndarray], image_ids: Sequence[str]) -> list[Segmentation]:
        return [Segmentation.of(image[..., 0] >= np.uint8(self.model.threshold), self.classes) for image in images]


@pytest.fixture
def threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = SegmenterKind(ThresholdConfig, Threshold, lambda config: {"threshold": "1"}, lambda config: "threshold")
    monkeypatch.setitem(SEGMENTERS, "threshold", kind)


def test_a_run_of_0_1_keeps_its_settings_and_fingerprint() -> None:
    run = read_run(str(RUN_0_1), Storage())
    config, classes = stored_settings(run)
    assert (config.dtype, config.batch_size, config.shard.images) == ("float32", 8, 2)
    now = identity_of(config, classes, run.identity["input_uri"], run.identity["weights"])
    now["cliper"] = "0.1.0"
    assert now == run.identity
    assert fingerprint(now) == json.loads((RUN_0_1 / "run.json").read_text())["fingerprint"] == "1c1b4565b49499e6"


def test_the_same_settings_in_either_place_are_the_same_job(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("model:\n  batch_size: 3\n  dtype: bfloat16\n  fgc: null\n")
    (tmp_path / "new.yaml").write_text("batch_size: 3\ndtype: bfloat16\nmodel:\n  fgc: null\n")
    old, new = load_config(str(tmp_path / "old.yaml")), load_config(str(tmp_path / "new.yaml"))
    assert old == new
    assert (new.cliper.batch_size, new.cliper.dtype) == (3, "bfloat16")
    classes = load_classes("tiny")
    assert identity_of(old, classes, "in", {}) == identity_of(new, classes, "in", {})
    (tmp_path / "both.yaml").write_text("batch_size: 3\nmodel:\n  batch_size: 4\n")
    with pytest.raises(ConfigError, match=r"batch_size is 3, but model\.batch_size is 4; give it once"):
        load_config(str(tmp_path / "both.yaml"))


def test_changes_keep_job_and_model_together() -> None:
    config = with_overrides(with_preset(JobConfig(), "fast"), Resources(), batch_size=2)
    assert (config.dtype, config.batch_size) == (config.cliper.dtype, config.cliper.batch_size) == ("bfloat16", 2)
    assert changed(config, dtype="float16").cliper.dtype == "float16"
    assert changed(config, model=CLIPerConfig(batch_size=5)).batch_size == 5
    assert validate(JobConfig, config.model_dump(mode="json"), "dump") == config


def test_a_segmenter_validates_its_own_settings(threshold: None) -> None:
    content = {"segmenter": "threshold", "model": {"threshold": 64, "batch_size": 2}}
    kind, config = chosen(JobConfig.model_validate(content))
    assert config.model == ThresholdConfig(threshold=64)
    assert config.batch_size == 2
    assert changed(config, dtype="float32").model == config.model
    assert chosen(config) == (kind, config)
    with pytest.raises(ConfigError, match="unknown key 'thresold'; allowed here: threshold"):
        chosen(JobConfig.model_validate({"segmenter": "threshold", "model": {"thresold": 1}}))
    with pytest.raises(ConfigError, match="unknown segmenter 'other'; known: cliper, ensemble, masks, sam3"):
        chosen(JobConfig(segmenter="other"))


def test_a_run_of_another_segmenter_names_its_settings(threshold: None, tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", 2)
    config = JobConfig.model_validate({"segmenter": "threshold", "model": {"threshold": 64}, "batch_size": 4})
    job = open_job(str(tmp_path / "in"), str(tmp_path / "run"), config, ClassList.parse(["red"]), Storage())
    assert job.run.identity["model"] == {"threshold": 64}
    assert (job.run.identity["batch_size"], job.run.identity["dtype"]) == (4, "float32")
    assert "resources" not in job.run.identity
    again, _ = stored_settings(job.run)
    assert chosen(again)[1].model == job.config.model


def test_what_only_cliper_can_do_is_refused_by_name(threshold: None, tmp_path: Path) -> None:
    config = JobConfig(segmenter="threshold")
    for wrong in (lambda: config.cliper, lambda: with_preset(config, "fast")):
        with pytest.raises(ConfigError, match="needs the segmenter 'cliper'; the configuration has 'threshold'"):
            wrong()
    with pytest.raises(ConfigError, match="--classes is needed: threshold has no classes"):
        classes_for(None, config)
    assert with_preset(config, "exact") == config
    (tmp_path / "bench.yaml").write_text(
        "benchmark: folder\nbackbone: none\nprotocol: cliper\nclasses: tiny\nsegmenter: threshold\n"
        "variants:\n  low: {threshold: 1}\n"
    )
    low = load_benchmark(str(tmp_path / "bench.yaml")).job("low")
    assert chosen(low)[1].model == ThresholdConfig(threshold=1)
    assert [variant["threshold"] for variant in make_grid(low, {"threshold": [1, 2]}).variants()] == [1, 2]
