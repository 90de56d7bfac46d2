"""`ray job submit` against a head started for the test: the job runs on that cluster and reports its exit code."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import PHOTOS
from tests.test_cli import all_rows

BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until all are known, so that they differ."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


# Every port whose default is a fixed number: another Ray on this machine has taken those, and without its agent
# port a node starts but never takes a job.
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")


class Head:
    """A head node with a dashboard, in a process group, a folder and at ports of its own."""

    def __init__(self, folder: Path) -> None:
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.folder, self.log = folder, folder / "head.log"
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=3", f"--temp-dir={folder}"]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, seconds: float = 300) -> None:
        """Until it takes jobs: the dashboard answers before its agent does."""
        deadline = time.monotonic() + seconds
        while (tried := self.job("submit", "--", "true")).returncode:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text() + tried.stdout + tried.stderr
            time.sleep(0.5)

    def stop(self) -> None:
        """At once: there is nothing to keep, and workers end with their raylet."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def job(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), "job", arguments[0], "--address", self.address, *arguments[1:]]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        started = Head(Path(folder))  # sockets inside: a path of more than 107 bytes is refused
        try:
            started.wait()
            yield started
        finally:
            started.stop()


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
