"""`ray job` against a head started for the test: submit, follow, stop, submit again, and the exit codes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import PHOTOS, ROOT
from tests.faults.processes import workers
from tests.faults.scenarios import SEGMENTING
from tests.support.command import all_rows
from tests.support.fakes import write_corpus
from tests.support.head import Head

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        started = Head(Path(folder))  # sockets inside: a path of more than 107 bytes is refused
        try:
            started.wait()
            yield started
        finally:
            started.stop()


def label_command(corpus: Path, output: Path, settings: dict[str, str]) -> list[str]:
    options = [part for pair in settings.items() for part in pair]
    return ["--", str(BIN / "cliper"), "label", "--input", str(corpus), "--output", str(output), *options]


def test_submitted_job_labels_and_follows(head: Head, tmp_path: Path, settings: dict[str, str]) -> None:
    done = head.job("submit", *label_command(PHOTOS, tmp_path / "run", settings))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "labeled   4 images" in done.stdout
    assert len(all_rows(tmp_path / "run")) == 4


WHERE = "import ray, cliper.pipeline as p; f = lambda: p.__file__; print(f(), ray.get(ray.remote(f).remote()))"


def test_a_submitted_checkout_replaces_the_installed_one(head: Head, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "weights")
    for folder in ("cliper", "pipeline"):
        shutil.copytree(ROOT / folder, checkout / folder, symlinks=True, ignore=ignored)
    done = head.job("submit", "--working-dir", str(checkout), "--", sys.executable, "-c", WHERE)
    assert done.returncode == 0, done.stdout + done.stderr
    driver, worker = next(line for line in done.stdout.splitlines() if line.endswith(".py")).split()
    for where in (driver, worker):
        assert Path(where).is_relative_to(head.folder.resolve()), where
        assert "working_dir" in where


def test_submitted_mistake_fails_the_job(head: Head, tmp_path: Path) -> None:
    done = head.job("submit", *label_command(Path("/nothing"), tmp_path / "run", {}))
    assert done.returncode == 1  # ray's own code for a failed job
    assert "failed with exit code 2" in done.stdout + done.stderr
    assert "cliper: input /nothing does not exist" in done.stdout + done.stderr


@pytest.mark.parametrize("token", [{}, {"RAY_AUTH_TOKEN": "0" * 64}], ids=["missing", "wrong"])
def test_a_token_that_is_missing_or_wrong_is_named(head: Head, tmp_path: Path, token: dict[str, str]) -> None:
    """Connect to the cluster directly, from a home directory without a token."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    mode = {"RAY_AUTH_MODE": "token"} if token else {}
    environment = plain | {"RAY_ADDRESS": head.gcs, "HOME": str(tmp_path)} | mode | token
    command = label_command(PHOTOS, tmp_path / "run", {})[1:]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    first, *_, last = done.stderr.strip().splitlines()
    assert first == f"connecting to Ray at {head.gcs} (RAY_ADDRESS)"
    assert last.startswith(f"cliper: Ray cannot be reached at RAY_ADDRESS={head.gcs}: ")
    assert "Failed to connect to Ray cluster" in last
    assert "RAY_AUTH_TOKEN" in last
    assert "Traceback" not in done.stderr


def segmenting(head: Head) -> list[int]:
    """The segmenting actors of this head's Ray."""
    return workers(head.process.pid, SEGMENTING)


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_stopped_job_stops_its_work_and_another_one_finishes_it(head: Head, tmp_path: Path) -> None:
    """The first job would take minutes (a second an image, by its runtime environment); the second does not."""
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    write_corpus(corpus, 200)
    (tmp_path / "config.yaml").write_text("{segmenter: steady, shard: {images: 4}, resources: {actors: 1}}")
    (tmp_path / "classes.txt").write_text("dark\nmiddle\nbright\n")
    files = {"--config": str(tmp_path / "config.yaml"), "--classes": str(tmp_path / "classes.txt")}
    command = label_command(corpus, run, files)
    command[1:2] = [sys.executable, "-m", "tests.faults.driver"]
    environment = {"PYTHONPATH": str(ROOT), "STEADY_SECONDS": "1"}
    slow = ["--runtime-env-json", json.dumps({"env_vars": environment})]
    submitted = head.job("submit", "--no-wait", "--submission-id", "first", *slow, *command)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_for(lambda: list((run / "labels").glob("shard-*")), "nothing was labeled")
    assert segmenting(head)
    stopped = head.job("stop", "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "stopped" in head.job("status", "first").stdout
    wait_for(lambda: not segmenting(head), "the actor still lives")
    assert len(list((run / "labels").iterdir())) < 50
    assert not (run / "lease.json").exists()
    logs = head.job("logs", "first")
    assert f"stopped; the same command continues {run}" in logs.stdout + logs.stderr

    fast = ["--runtime-env-json", json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})]
    done = head.job("submit", *fast, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " of them done" in done.stdout + done.stderr
    rows = all_rows(run)
    assert len(rows) == len({row["image_id"] for row in rows}) == 200
