"""Drivers in separate processes, and the workers below them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tests.conftest import ROOT
from tests.faults.place import Place

T = TypeVar("T")

PATIENCE = 1800.0  # seconds until a scenario is abandoned; speed is not tested


class Driver:
    """`python -m tests.faults.driver label ...` in a separate session."""

    def __init__(self, place: Place, run: str, options: list[str], ray: str | None) -> None:
        """Label into `run` at `place`, on the Ray at `ray` or (None) one that the driver starts itself."""
        self.place, self.run, self.log = (
            place,
            run,
            place.folder.parent / f"{place.name}-{run.replace('/', '-')}.log",
        )
        command = [
            sys.executable,
            "-m",
            "tests.faults.driver",
            "label",
            "--output",
            f"{place.root}/{run}",
            *options,
        ]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": str(ROOT)} | ({"RAY_ADDRESS": ray} if ray else {})
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def shards(self) -> int:
        """The shards committed so far, by any driver."""
        return len(list((self.place.folder / self.run / "labels").glob("shard-*.parquet")))

    def kill(self) -> bool:
        """SIGKILL the driver's session, including a Ray that it started. False if it had already ended."""
        alive = self.process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return alive

    def finish(self, expected: int = 0) -> str:
        """Wait for the process to end and return its log. Raises AssertionError on another exit code."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.run} did not end in {PATIENCE:g} s\n{self.text()}") from None
        assert code == expected, f"exit code {code}, not {expected}\n{self.text()}"
        return self.text()

    def text(self) -> str:
        """The output of all drivers of this run."""
        return self.log.read_text(errors="replace")

    def wait_for_shards(self, count: int) -> bool:
        """Wait until `count` shards are committed; False if the driver ended before."""
        return bool(self.wait_for(lambda: self.shards() >= count))

    def wait_for(self, look: Callable[[], T]) -> T | None:
        """Poll until the result is true, and return it; None if the driver ended before."""
        deadline = time.monotonic() + PATIENCE
        while not (seen := look()):
            if self.process.poll() is not None:
                return None
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.01)
        return seen


def workers(root: int, title: str) -> list[int]:
    """Ray workers below process `root` whose title matches; Ray sets a worker's title to its current task."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text()
                titles[int(entry.name)] = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:  # it has just ended
                continue
            parents[int(entry.name)] = int(status.rpartition(")")[2].split()[1])
    return [pid for pid in titles if re.match(title, titles[pid]) and _below(pid, root, parents)]


def _below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != root:
        pid = parents[pid]
    return pid == root
