"""Shared and changing clusters: runs start, wait, grow, and never stall."""

import json
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cliper.jobs.common import execute
from cliper.jobs.session import ray_session
from cliper.pipeline.errors import ResourceError
from cliper.pipeline.flow import label_corpus
from cliper.pipeline.label import cluster
from cliper.pipeline.label.pool import Pool
from cliper.pipeline.run.verify import verify_run
from tests.label.test_clusters import ALL, placed_job
from tests.support.fakes import write_corpus
from tests.support.head import Head
from tests.support.jobs import fake_job, tasks_of
from tests.support.placed import Placed, logical_cluster


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 24)
    return folder


def hog(cpus: float) -> Any:
    """A running actor of another job."""
    import ray

    @ray.remote
    class Hog:
        def up(self) -> bool:
            return True

    actor = Hog.options(num_cpus=cpus).remote()
    assert ray.get(actor.up.remote(), timeout=60)
    return actor


def test_a_shared_node(corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other work holds CPUs: the pool fits next to it, waits for it, or outlives it."""
    import ray

    with logical_cluster({"num_cpus": 4}), ray_session(verbose=False, wait=0) as session:
        session.connect()
        other = hog(1)
        beside, placed = placed_job(monkeypatch, corpus, tmp_path / "beside", session)
        execute(beside, session)  # an entrypoint that holds a CPU used to leave none for loading
        assert [note["resources"]["CPU"] for note in placed.notes] == [2.0]
        assert verify_run(beside.run).whole

        monkeypatch.setattr(cluster, "GRACE_SECONDS", 1.0)
        full, _ = placed_job(monkeypatch, corpus, tmp_path / "full", session, actors=1, cpus_per_actor=3)
        with pytest.raises(ResourceError, match="fit this cluster, but other work is running on it"):
            execute(full, session)
        session.wait = 60
        Thread(target=lambda: (time.sleep(3), ray.kill(other))).start()
        execute(full, session)  # waits for the CPU that the other work releases
        assert verify_run(full.run).whole

        other, taken = hog(1), fake_job(str(corpus), str(tmp_path / "taken"), shard={"images": 4})
        Thread(target=lambda: (time.sleep(3), ray.kill(other))).start()
        # Planned before the other work came: loading has its share, and the actor starts when a CPU is free.
        assert len(list(label_corpus(taken, tasks_of(taken), Pool(1, 3.0, 0)))) == 6


def test_two_runs_at_once_both_finish(corpus: Path, tmp_path: Path) -> None:
    """Each fits alone; together their actors leave no CPU, but the CPUs for loading are reserved first."""
    with logical_cluster({"num_cpus": 4}), ray_session(verbose=False) as session:
        session.connect()
        jobs = [fake_job(str(corpus), str(tmp_path / name), shard={"images": 2}) for name in ("a", "b")]
        with ThreadPoolExecutor(2) as threads:
            runs = [threads.submit(lambda j: list(label_corpus(j, tasks_of(j), Pool(2, 1.0, 0))), j) for j in jobs]
            assert [len(run.result(timeout=240)) for run in runs] == [12, 12]
    assert all(verify_run(job.run).whole for job in jobs)


def test_an_elastic_pool_grows_with_the_cluster(tmp_path: Path) -> None:
    """It starts on one node of three and uses all three once they have joined."""
    write_corpus(tmp_path / "corpus", 800)
    placed = Placed(str(tmp_path / "placed"), seconds=0.2, hurries=3)
    with logical_cluster({"num_cpus": 2, "num_gpus": 1}) as nodes, ray_session(verbose=False) as session:
        session.connect()
        job = fake_job(str(tmp_path / "corpus"), str(tmp_path / "run"), make=placed, shard={"images": 8})
        finished = 0
        for _ in label_corpus(job, tasks_of(job), Pool(1, 1.0, 1, max_actors=3)):
            finished += 1
            if finished == 2:
                assert len(placed.notes) == 1
                for _ in range(2):
                    nodes.add_node(num_cpus=2, num_gpus=1, object_store_memory=80_000_000)
    assert len({note["node"] for note in placed.notes}) == 3
    assert finished == 100
    assert verify_run(job.run).whole


def test_placement_by_accelerator_custom_resource_and_label(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = {"num_cpus": 4, "num_gpus": 1}
    marked = plain | {"resources": {"accelerator_type:A100": 1, "licensed": 1}, "labels": {"zone": "b"}}
    wanted = ({"accelerator_type": "A100"}, {"custom": {"licensed": 1}}, {"labels": {"zone": "b"}})
    with logical_cluster(plain, marked), ray_session(verbose=False, wait=30) as session:
        nodes = {node["NodeID"]: node for node in _nodes(session)}
        for number, placement in enumerate(wanted):
            folder = tmp_path / str(number)
            job, placed = placed_job(monkeypatch, corpus, folder, session, actors=1, **placement)
            execute(job, session)
            [note] = placed.notes
            assert nodes[note["node"]]["Resources"].get("licensed") == 1, placement


@pytest.mark.skipif(not ALL, reason="with CLIPER_CLUSTERS=all")
def test_a_run_starts_nodes_through_the_autoscaler(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's own autoscaler, with nodes that it starts on this machine: a head without CPUs, and no workers."""
    from ray._private import services

    address = services.get_node_ip_address()
    with socket.socket() as probe:
        if probe.connect_ex((address, GCS_PORT)) == 0:
            pytest.skip(f"port {GCS_PORT} is taken, and Ray's provider for tests knows no other")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        config = Path(folder) / "autoscaler.json"
        config.write_text(json.dumps(AUTOSCALER))
        tick = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled"}
        where = (f"--port={GCS_PORT}", f"--node-ip-address={address}")
        head = Head(Path(folder), f"--autoscaling-config={config}", *where, cpus=0, **tick)
        monkeypatch.setenv("RAY_ADDRESS", f"{address}:{GCS_PORT}")
        try:
            with ray_session(verbose=False, wait=0) as session:
                wanted = {"actors": 1, "device": "cuda"}
                job, placed = placed_job(monkeypatch, corpus, tmp_path, session, **wanted)
                with pytest.raises(ResourceError, match="no node has a GPU; the nodes have 0 CPUs"):
                    execute(job, session)
                session.wait = 120
                execute(job, session)
        finally:
            head.stop()
    assert [len(note["gpus"]) for note in placed.notes] == [1]
    assert verify_run(job.run).whole


GCS_PORT = 6379
_SHAPE = {"resources": {"CPU": 2, "GPU": 1, "object_store_memory": 80_000_000}, "node_config": {}}
AUTOSCALER = {  # Ray's provider for tests: its nodes are processes on this machine
    "cluster_name": "test",
    "max_workers": 1,
    "provider": {"type": "fake_multinode"},
    "head_node_type": "ray.head.default",
    "idle_timeout_minutes": 5,
    "upscaling_speed": 1.0,
    **{key: {} for key in ("auth", "file_mounts", "head_node", "worker_nodes")},
    **{key: [] for key in ("cluster_synced_files", "initialization_commands", "setup_commands")},
    **{f"{where}_{what}_commands": [] for where in ("head", "worker") for what in ("setup", "start_ray")},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu": _SHAPE | {"min_workers": 0, "max_workers": 1},
    },
}


def _nodes(session: Any) -> list[dict[str, Any]]:
    import ray

    session.connect()
    return ray.nodes()
