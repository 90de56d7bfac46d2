"""Actors use exactly the weights of the run or refuse to start; their errors arrive unchanged."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cliper.jobs.cli import app, run
from cliper.model.classes import ClassList
from cliper.model.errors import WeightsError
from cliper.pipeline.config import JobConfig
from cliper.pipeline.corpus.load import load_entries
from cliper.pipeline.errors import ResourceError
from cliper.pipeline.flow import label_corpus
from cliper.pipeline.label.actor import SegmentShard
from cliper.pipeline.label.job import Job, open_job
from cliper.pipeline.label.pool import Pool
from cliper.pipeline.label.stages import Task
from cliper.pipeline.storage.backend import Storage
from tests.conftest import PARITY, PHOTOS
from tests.support.fakes import CLASSES, Brightness, kind, write_corpus
from tests.support.hub import Hub, connected, folder_files

SD = folder_files(PARITY / "sd_tiny")
CHANGED = SD | {
    "scheduler/scheduler_config.json": SD["scheduler/scheduler_config.json"].replace(b"0.012", b"0.013")
}
ONE_ACTOR = Pool(actors=1, cpus_per_actor=1, gpus_per_actor=0)


def hub_config(clip: str) -> JobConfig:
    """FGC from the hub's main branch."""
    model = {
        "backbone": {"model": clip},
        "fusion": {"short_side": 64},
        "prompts": {"templates": ["a photo of a {}."]},
        "fgc": {"model": "owner/sd", "resolution": 64},
    }
    return JobConfig.model_validate({"model": model, "shard": {"images": 1}})


@pytest.fixture
def job(hub: Hub, tiny_clip: Path, tmp_path: Path) -> Job:
    """A job whose driver has resolved `main` and filled its cache; the hub's main branch moves on afterwards."""
    repository = hub.add("owner/sd", SD)
    opened = open_job(str(PHOTOS), str(tmp_path / "run"), hub_config(f"local-dir:{tiny_clip}"), CLASSES, Storage())
    repository.commit(CHANGED)
    return opened


def first_shard(job: Job) -> tuple[SegmentShard, object]:
    """Load and label a shard, as an actor does on its node."""
    entries = job.manifest.read_shard(job.run.storage, job.run.uri, 0)
    actor = SegmentShard(job.kind.make, job.config, job.classes, job.run, cpu_threads=1, driver="me")
    return actor, load_entries(job.run.storage, 0, entries, "image")


def test_the_driver_pins_the_commit(hub: Hub, job: Job) -> None:
    first = next(iter(hub.repositories["owner/sd"].commits))
    assert job.config.model.fgc is not None
    assert job.config.model.fgc.revision == first != hub.repositories["owner/sd"].branches["main"]
    assert job.run.identity["model"]["fgc"]["revision"] is None  # the settings are the user's
    assert set(job.run.identity["weights"]) == {"backbone", "fgc"}


def test_a_node_with_an_empty_cache_fetches_the_commit_of_the_run(
    hub: Hub, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with connected(monkeypatch, hub.endpoint, tmp_path / "other-cache"):
        hub.requests.clear()
        actor, table = first_shard(job)
        assert actor(table).column("status").to_pylist() == ["ok"]
    assert len(hub.downloads()) == 9
    assert "Fetching" not in capfd.readouterr().err  # one progress bar, the driver's


def test_a_node_with_another_commit_in_its_cache(
    hub: Hub, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache holds the branch's current commit, which must not be used; without a network the node refuses."""
    other = tmp_path / "other-cache"
    with connected(monkeypatch, hub.endpoint, other):
        job.kind.identity(hub_config("embedded:tiny"))
    with connected(monkeypatch, "http://127.0.0.1:9", other):
        actor, table = first_shard(job)
        with pytest.raises(
            WeightsError,
            match=r"on node .*: 'owner/sd' at revision [0-9a-f]{40} is not in the cache .*cannot be reached",
        ):
            actor(table)
    with connected(monkeypatch, hub.endpoint, other):
        actor, table = first_shard(job)
        assert actor(table).column("status").to_pylist() == ["ok"]


def test_a_node_whose_cache_was_changed_is_refused(job: Job, tmp_path: Path) -> None:
    [config] = (tmp_path / "hub-cache").glob("models--owner--sd/snapshots/*/scheduler/scheduler_config.json")
    config.write_bytes(CHANGED["scheduler/scheduler_config.json"])
    actor, table = first_shard(job)
    with pytest.raises(WeightsError, match="node .* has other weights than the run: fgc is .*, run.json says"):
        actor(table)
    assert not (tmp_path / "run" / "labels").exists()


def test_a_local_folder_that_differs_between_nodes_is_refused(tmp_path: Path, tiny_clip: Path) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(PARITY / "sd_tiny", folder)
    config = hub_config(f"local-dir:{tiny_clip}")
    model = config.model.model_dump() | {"fgc": {"model": str(folder), "resolution": 64}}
    local = JobConfig.model_validate({"model": model})
    job = open_job(str(PHOTOS), str(tmp_path / "run"), local, CLASSES, Storage())
    shutil.rmtree(folder)
    actor, table = first_shard(job)
    with pytest.raises(WeightsError, match="on node .* is not a folder on this machine"):
        actor(table)


def test_the_command_refuses_before_anything_is_written(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/sd", {name: data for name, data in SD.items() if "text_encoder/model" not in name})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(hub_config("embedded:tiny").model_dump(mode="json")))
    monkeypatch.setattr("cliper.jobs.session._connected", None)  # Ray is not started
    command = ["label", "--input", str(PHOTOS), "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        run(lambda: app([*command, "--config", str(tmp_path / "config.yaml")], standalone_mode=False))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "cliper: owner/sd: missing: text_encoder/model.safetensors\n"
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    def too_large(config: JobConfig, classes: ClassList) -> Brightness:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    write_corpus(tmp_path / "corpus", 1)
    job = open_job(str(tmp_path / "corpus"), str(tmp_path / "run"), JobConfig(), CLASSES, Storage())
    actor = SegmentShard(too_large, job.config, job.classes, job.run, cpu_threads=1, driver="me")
    entries = job.manifest.read_shard(job.run.storage, job.run.uri, 0)
    with pytest.raises(ResourceError, match=r"does not fit into memory \(CUDA out of memory.*GiB.\); free"):
        actor(load_entries(job.run.storage, 0, entries, "image"))


@pytest.mark.usefixtures("ray_local")
def test_an_expected_error_of_the_constructor_ends_the_run_at_the_first_load(tmp_path: Path) -> None:
    loads = tmp_path / "loads"

    def unavailable(config: JobConfig, classes: ClassList) -> Brightness:
        with loads.open("a") as log:
            log.write("1")
        raise WeightsError("no weights on this node; copy them")

    write_corpus(tmp_path / "corpus", 3)
    job = open_job(str(tmp_path / "corpus"), str(tmp_path / "run"), JobConfig(), CLASSES, Storage())
    failing = replace(job, kind=kind(unavailable))
    with pytest.raises(WeightsError, match="^no weights on this node; copy them$"):
        list(label_corpus(failing, [Task(0)], ONE_ACTOR))
    assert loads.read_text() == "1"
