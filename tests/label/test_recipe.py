"""The recipe "A network of your own" of docs/RECIPES.md, through label, plan, evaluate, serve and sweep."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cliper.jobs.evaluations import _finish, _stored_setting
from cliper.model.classes import ClassList
from cliper.model.errors import ConfigError, WeightsError
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.sources import list_entries
from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.evaluation import Evaluation, open_evaluation
from cliper.pipeline.evaluate.prepare.write import prepare
from cliper.pipeline.evaluate.sweep import SweepShard, make_grid, open_sweep, sweep_results
from cliper.pipeline.label.estimate import measure
from cliper.pipeline.label.job import open_job
from cliper.pipeline.label.segmenters import SEGMENTERS, chosen
from cliper.pipeline.label.stages import Task, load_task
from cliper.pipeline.report.preview import Choice, Previewer, config_file, render_preview
from cliper.pipeline.run.masks import unpack_mask
from cliper.pipeline.run.verify import verify_run
from cliper.pipeline.storage.backend import Storage
from tests.conftest import ROOT
from tests.support.direct import label_directly
from tests.support.fakes import jpeg
from tests.support.labeled import rows_of

RECIPE = re.findall(r"^```python\n(# segformer\.py\n.*?)^```", (ROOT / "docs/RECIPES.md").read_text(), re.M | re.S)
CLASSES = ClassList.parse(["middle", "dark"])  # not in the network's order


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SegFormer of 10,000 random weights."""
    import torch

    from cliper.model._libraries import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_sizes": [8, 16], "decoder_hidden_size": 16, "num_attention_heads": [1, 2]}
    layers = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2], "mlp_ratios": [2, 2]}
    names = {"id2label": dict(enumerate(["dark", "middle", "bright"]))}
    config = transformers.SegformerConfig(**sizes, **layers, **names, patch_sizes=[7, 3], strides=[4, 2])
    folder = tmp_path_factory.mktemp("segformer")
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(weights: Path) -> Iterator[JobConfig]:
    before = dict(SEGMENTERS)
    exec(compile(RECIPE[0], "segformer.py", "exec"), {"__name__": "segformer"})
    model = {"weights": str(weights), "side": 64, "labels": {"threshold": 0.02, "margin_rule": True}}
    yield JobConfig.model_validate({"segmenter": "segformer", "model": model, "batch_size": 2})
    SEGMENTERS.clear()
    SEGMENTERS.update(before)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "raw" / "images").mkdir(parents=True)
    for seed in range(3):
        (tmp_path / "raw" / "images" / f"p{seed}.jpg").write_bytes(jpeg(seed))
    return tmp_path / "raw" / "images"


def test_the_recipe_is_short() -> None:
    [code] = RECIPE
    assert len([line for line in code.splitlines() if line.strip()]) < 60


def test_label_evaluate_and_serve_give_one_mask(config: JobConfig, corpus: Path, tmp_path: Path) -> None:
    run = label_directly(str(corpus), str(tmp_path / "run"), config, CLASSES)
    assert verify_run(run).whole
    rows = rows_of(run)
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert {entry["name"] for row in rows for entry in row["classes"]} > {"background"}
    (corpus.parent / "labels").mkdir()
    (corpus.parent / "classes.txt").write_text("middle\ndark\n")
    for row in rows:
        Image.fromarray(unpack_mask(row)).save(corpus.parent / "labels" / f"{Path(row['image_id']).stem}.png")
    evaluation = open_evaluation(run, prepare("folder", corpus.parent, str(tmp_path / "out"), Storage()))
    counted = evaluation.counter().stage(pa.table({"shard": evaluation.uncounted_shards()}))
    assert counted["problem"].null_count == len(counted)
    results, _ = _finish(evaluation, _stored_setting(run, None, None, None))
    assert results["model"] == "segformer"
    swept = sweep(config, corpus, tmp_path / "run", evaluation)
    assert [(row["labels.threshold"], row["miou"] == 1) for row in swept] == [(0.02, True), (0.9, False)]
    previewer = Previewer(config)
    preview = previewer.label((corpus / "p1.jpg").read_bytes(), "p1.jpg", Choice(CLASSES, (), 0, 0, fgc=False))
    assert np.array_equal(preview.labels, unpack_mask(rows[1]))
    page = render_preview(preview)
    assert "middle" in page
    assert "<h2>Scores</h2>" not in page
    assert "segmenter: segformer" in config_file(preview.settings)


def sweep(config: JobConfig, corpus: Path, folder: Path, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Two thresholds, of which the first is the run's, against the run's own masks."""
    job = open_job(str(corpus), str(folder), config, CLASSES, Storage())
    grid = make_grid(job.config, {"labels.threshold": [0.02, 0.9]})
    where = open_sweep(evaluation, grid)
    worker = SweepShard(job, grid, evaluation.counter(where), cpu_threads=1)
    summaries = [worker(load_task(job, Task(shard))) for shard in range(job.manifest.shards)]
    assert all(summary["problem"].null_count for summary in summaries)
    return sweep_results(Storage(), where, evaluation.prepared, grid, "cliper")


def test_plan_measures_it(config: JobConfig, corpus: Path) -> None:
    kind, settings = chosen(config)
    entries = list(list_entries(Storage(), str(corpus), settings.input))
    found = measure(entries, Storage(), kind.make, settings, CLASSES)
    assert (found.images, found.failed) == (3, 0)


def test_mistakes_are_named_before_anything_starts(config: JobConfig, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="'sides' cannot be swept; allowed: labels.* labels.threshold, side"):
        make_grid(config, {"sides": [1]})
    for model, error, message in (
        ({"weights": "/nowhere"}, WeightsError, "there is no /nowhere/model.safetensors"),
        (
            {"weights": "/nowhere", "sides": 1},
            ConfigError,
            "unknown key 'sides'; allowed here: weights, side",
        ),
        ({}, ConfigError, "weights: Field required"),
    ):
        wrong = JobConfig.model_validate({"segmenter": "segformer", "model": model})
        with pytest.raises(error, match=message):
            label_directly(str(corpus), str(tmp_path / "run"), wrong, CLASSES)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="unknown class 'cat'; known: bright, dark, middle"):
        label_directly(str(corpus), str(tmp_path / "other"), config, ClassList.parse(["cat"]))
