"""Commands on clusters with logical GPUs: Ray schedules as in production, and the device is the CPU.

CLIPER_CLUSTERS=all runs every command on every cluster; by default each cluster and each command occur once.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.jobs.common import execute
from cliper.jobs.options import Resources, with_overrides
from cliper.jobs.retry import retry_failed
from cliper.jobs.session import ray_session
from cliper.model.config import CLIPerConfig, Settings
from cliper.pipeline.config import JobConfig
from cliper.pipeline.evaluate.prepare.write import prepare
from cliper.pipeline.label.job import Job, open_job
from cliper.pipeline.label.segmenters import SEGMENTERS, SegmenterKind
from cliper.pipeline.run.failed import find_failed
from cliper.pipeline.run.verify import verify_run
from cliper.pipeline.storage.backend import Storage
from tests.support import benchmark_trees as trees
from tests.support.fakes import CLASSES, write_corpus
from tests.support.labeled import rows_of
from tests.support.placed import Placed, logical_cluster

CLUSTERS: dict[str, list[dict[str, Any]]] = {
    "one-gpu": [{"num_cpus": 4, "num_gpus": 1}],
    "one-and-four-gpus": [{"num_cpus": 4, "num_gpus": 1}, {"num_cpus": 6, "num_gpus": 4}],
    "head-without-gpu": [{"num_cpus": 0}, {"num_cpus": 4, "num_gpus": 1}],
}
ALL = os.environ.get("CLIPER_CLUSTERS") == "all"


@dataclass
class Here:
    """A cluster, and a folder of images."""

    name: str
    nodes: list[dict[str, Any]]
    corpus: Path


@pytest.fixture(scope="module", params=list(CLUSTERS))
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    corpus = tmp_path_factory.mktemp("corpus")
    write_corpus(corpus, 24)
    with logical_cluster(*CLUSTERS[request.param]):
        yield Here(request.param, CLUSTERS[request.param], corpus)


def only_on(here: Here, name: str) -> None:
    if here.name != name and not ALL:
        pytest.skip("with CLIPER_CLUSTERS=all")


def placed_job(
    monkeypatch: pytest.MonkeyPatch,
    corpus: Path,
    folder: Path,
    session: Any,
    together: int = 1,
    **resources: Any,
) -> tuple[Job, Placed]:
    """The job of `cliper label` up to the flow, with a segmenter that records its node."""
    placed = Placed(str(folder / "placed"), together=together)
    monkeypatch.setitem(
        SEGMENTERS, "placed", SegmenterKind(Settings, placed, lambda config: {}, lambda config: "placed")
    )
    content = {"segmenter": "placed", "shard": {"images": 4}, "resources": {"threads": 0} | resources}
    config = with_overrides(JobConfig.model_validate(content), Resources())
    job = open_job(str(corpus), str(folder / "run"), config, CLASSES, Storage(), None, session.wants_gpu)
    return job, placed


def test_label_and_retry(here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus = sum(node.get("num_gpus", 0) for node in here.nodes)
    (here.corpus / "broken.jpg").write_bytes(b"no image")
    with ray_session(verbose=False, wait=30) as session:
        job, placed = placed_job(monkeypatch, here.corpus, tmp_path, session, gpus, cpus_per_actor=1)
        execute(job, session)
        assert job.config.dtype == "float16"
        (here.corpus / "broken.jpg").unlink()
        failed = find_failed(job.run, job.manifest)
        progress = retry_failed(job, failed, session)
    assert verify_run(job.run).whole
    rows = rows_of(job.run)
    assert [row["error_type"] for row in rows if row["status"] != "ok"] == ["missing"]
    assert len(rows) == 25
    assert progress.images == 1
    assert all(len(note["gpus"]) == 1 for note in placed.notes)
    assert len(placed.notes) >= gpus  # an actor per GPU, and those of the retry


def test_evaluate_and_sweep(here: Here, settings: dict[str, str], tmp_path: Path) -> None:
    only_on(here, "one-gpu")
    root = tmp_path / "raw"
    root.mkdir()
    trees.folder(root, images=3)
    prepared = prepare("folder", root, str(tmp_path / "out"), Storage())
    model = yaml.safe_load(Path(settings["--config"]).read_text())["model"]
    content = {
        "benchmark": "folder",
        "backbone": "tiny",
        "protocol": "cliper",
        "classes": str(root / "classes.txt"),
        "model": CLIPerConfig.model_validate(model | {"dtype": "float32"}).model_dump(mode="json"),
        "variants": {"whole": {}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    common = [str(tmp_path / "tiny.yaml"), "--data", prepared.uri, "--wait-for-resources", "30s"]
    done = CliRunner().invoke(
        app, ["evaluate", *common, "--output", str(tmp_path / "run")], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "run/evaluation/folder-png/cliper/metrics.json").read_text())
    assert metrics["images"] == 3
    swept = ["--output", str(tmp_path / "swept"), "--sweep", "background_threshold=0.2,0.6"]
    done = CliRunner().invoke(app, ["evaluate", *common, *swept], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "2 variants" in done.output


def test_plan(here: Here, settings: dict[str, str]) -> None:
    only_on(here, "one-gpu")
    options = [part for pair in settings.items() for part in pair]
    arguments = ["plan", *options, "--input", str(here.corpus), "--sample", "4"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "corpus    24 images" in done.output


def test_actors_on_cpus_in_spite_of_gpus(here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only_on(here, "one-gpu")
    with ray_session(verbose=False, wait=30) as session:
        job, placed = placed_job(
            monkeypatch, here.corpus, tmp_path, session, 2, device="cpu", cpus_per_actor=1, actors=2
        )
        execute(job, session)
    assert job.config.dtype == "float32"
    assert [note["gpus"] for note in placed.notes] == [[], []]


def test_two_actors_share_a_gpu(here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only_on(here, "one-gpu")
    with ray_session(verbose=False, wait=30) as session:
        job, placed = placed_job(monkeypatch, here.corpus, tmp_path, session, together=2, actors_per_gpu=2)
        execute(job, session)
    assert {note["resources"]["GPU"] for note in placed.notes} == {0.5}
    actors = Counter((note["node"], *note["gpus"]) for note in placed.notes)
    assert max(actors.values()) == 2
