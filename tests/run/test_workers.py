"""Commands that read a run, as tasks of a Ray cluster: the same bytes, errors and resumption as in one process."""

import json
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.jobs.workers import parse_workers
from cliper.model.errors import ConfigError
from cliper.pipeline.errors import ExportError, ResourceError, RunError
from cliper.pipeline.evaluate.evaluation import open_evaluation
from cliper.pipeline.export import driver
from cliper.pipeline.label import cluster
from cliper.pipeline.label.cluster import wait_for_cpu, wait_for_release
from cliper.pipeline.parallel import Workers, crew
from cliper.pipeline.report.run_page import write_run_report
from cliper.pipeline.review.select import select_images
from cliper.pipeline.run.folder import Run
from cliper.pipeline.run.verify import verify_run
from tests.evaluate.test_evaluate import count, prepared_folder
from tests.support import benchmark_trees as trees
from tests.support.export_runs import plan_of, scenes, scripted_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return scripted_run(tmp_path_factory.mktemp("labeled"), scenes(60), shard={"images": 3})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(run: Run, folder: Path, workers: Workers) -> dict[str, bytes]:
    """What every command writes or prints."""
    for name in ("coco", "webdataset"):
        driver.export(run, plan_of(run, name), str(folder / name), workers)
    write_run_report(run, str(folder / "report.html"), 1000, workers)
    picks = repr(select_images(run, 50, workers=workers))
    return files(folder) | {"verify": verify_run(run, workers).to_json().encode(), "picks": picks.encode()}


def test_ray_gives_the_bytes_of_one_process(ray_local: None, run: Run, tmp_path: Path) -> None:
    alone = everything(run, tmp_path / "alone", 1)
    assert json.loads(alone["verify"])["whole"]
    assert len(alone) > 8
    assert everything(run, tmp_path / "ray", "ray") == alone


def test_an_interrupted_export_continues_on_ray(ray_local: None, run: Run, tmp_path: Path) -> None:
    plan, output = plan_of(run, "coco"), tmp_path / "coco"
    driver.export(run, plan, str(tmp_path / "whole"), 1)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver.export(run, plan, str(output), "ray", on_shard=stop)
    kept = {path.name for path in (output / ".cliper").iterdir() if not path.name.startswith(".")}
    assert len(kept) >= 4
    counted: list[int] = []
    driver.export(run, plan, str(output), "ray", on_shard=lambda done, total: counted.append(done))
    assert counted[0] > 4  # finished shards are not exported again
    assert files(output) == files(tmp_path / "whole")


def refuse(shard: int) -> int:
    if shard == 5:
        raise RunError(f"shard {shard} is damaged")
    return shard


def divide(shard: int) -> float:
    return 1 / (shard - 5)


def test_an_expected_error_arrives_as_itself(ray_local: None) -> None:
    with pytest.raises(RunError, match=r"^shard 5 is damaged$"), crew("ray") as workers:
        list(workers.map(refuse, range(20)))
    with pytest.raises(ZeroDivisionError), crew("ray") as workers:
        list(workers.map(divide, range(20)))


def test_work_is_taken_up_only_as_fast_as_results_are_used(ray_local: None) -> None:
    taken, lock = [0], threading.Lock()

    def items() -> object:
        for i in range(1000):
            with lock:
                taken[0] += 1
            yield i

    with crew("ray") as workers:
        results = workers.map(abs, items())  # type: ignore[arg-type, var-annotated]
        assert next(results) == 0
        assert taken[0] <= 2 * workers.size + 2
        assert list(results) == list(range(1, 1000))


def test_the_commands_run_on_ray(
    ray_local: None, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cliper.jobs.session.RaySession.connect", lambda session: None)  # it is connected
    for command in (
        ["verify", run.uri],
        ["report", run.uri, "--output", str(tmp_path / "page.html")],
        ["export", run.uri, "--to", "coco", "--output", str(tmp_path / "coco")],
        ["review", "pick", run.uri, "--output", str(tmp_path / "review")],
    ):
        done = CliRunner().invoke(app, [*command, "--workers", "ray"])
        assert done.exit_code == 0, done.output
    assert (tmp_path / "coco" / "cliper-export.json").is_file()


def test_the_default_is_ray_where_an_address_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert isinstance(parse_workers(None), int)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert parse_workers(None) == "ray"
    assert parse_workers("3") == 3
    for text in ("0", "-1", "many", ""):
        with pytest.raises(ConfigError, match="expected a number of processes of at least 1, or ray"):
            parse_workers(text)


def test_an_error_of_the_plan_comes_before_any_worker(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    with pytest.raises(ExportError, match="is not empty and not an export"):
        driver.export(run, plan_of(run, "coco"), str(tmp_path), "ray")  # no Ray is connected


def test_counts_are_summed_on_ray(ray_local: None, tmp_path: Path) -> None:
    truths, prepared = prepared_folder(tmp_path)
    evaluation = open_evaluation(trees.stored_run(str(tmp_path / "run"), prepared, truths), prepared)
    assert count(evaluation) == []
    alone, together = evaluation.read(), evaluation.read("ray")
    assert alone.confusion.sum() > 0
    assert together.confusion.tolist() == alone.confusion.tolist()


def test_a_cluster_without_a_free_cpu_is_waited_for_aloud_and_for_a_bounded_time(ray_local: None) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    lines: list[str] = []
    group = placement_group([{"CPU": 4}])
    assert group.wait(30)
    try:
        with pytest.raises(ResourceError, match=r"no CPU of the cluster is free; free: 0 CPUs"):
            wait_for_cpu(1.0, lines.append)
    finally:
        remove_placement_group(group)
    assert lines[0].startswith("waiting for resources, 1 s more: no CPU of the cluster is free; free: 0 CPUs")
    assert wait_for_cpu(30.0, lines.append) >= 1


def test_a_pool_is_planned_when_the_commands_own_tasks_have_released_their_cpus(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    free = wait_for_cpu(30.0, print)
    group = placement_group([{"CPU": 1}])
    assert group.wait(30)
    began = time.monotonic()
    threading.Thread(target=lambda: (time.sleep(1), remove_placement_group(group))).start()
    wait_for_release(free)
    assert 1 <= time.monotonic() - began < cluster.RELEASE_SECONDS
    monkeypatch.setattr(cluster, "RELEASE_SECONDS", 0.3)
    wait_for_release(free + 1)  # other work has taken one
