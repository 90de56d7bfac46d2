"""`ray job submit` against a head started for the test: the job runs on that cluster and reports its exit code."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PHOTOS
from tests.test_cli import all_rows

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """A head node with a dashboard, in a process group of its own."""

    def __init__(self, log: Path) -> None:
        self.address = f"http://127.0.0.1:{free_port()}"
        self.environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=3", f"--port={free_port()}"]
        command += [f"--dashboard-port={self.address.rpartition(':')[2]}", "--object-store-memory=200000000"]
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 90
        while self.job("submit", "--", "true").returncode:  # the dashboard answers before its agent takes jobs
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)

    def job(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), "job", arguments[0], "--address", self.address, *arguments[1:]]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=180
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    started = Head(tmp_path_factory.mktemp("head") / "log")
    yield started
    os.killpg(started.process.pid, signal.SIGTERM)
    started.process.wait(timeout=60)


def test_submitted_job_labels_and_follows(head: Head, tmp_path: Path, settings: dict[str, str]) -> None:
    options = [part for pair in settings.items() for part in pair]
    command = [
        "--",
        str(BIN / "cliper"),
        "label",
        "--input",
        str(PHOTOS),
        "--output",
        str(tmp_path / "run"),
        *options,
    ]
    done = head.job("submit", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "labeled   4 images" in done.stdout
    assert len(all_rows(tmp_path / "run")) == 4


def test_submitted_mistake_fails_the_job(head: Head, tmp_path: Path) -> None:
    done = head.job(
        "submit", "--", str(BIN / "cliper"), "label", "--input", "/nothing", "--output", str(tmp_path / "o")
    )
    assert done.returncode == 1  # ray's own code for a failed job
    assert "failed with exit code 2" in done.stdout + done.stderr
    assert "cliper: input /nothing does not exist" in done.stdout + done.stderr
