"""A head node started by `ray start --head`."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Free ports; all are held until all are known, so that they differ."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


# Every port whose default is a fixed number: another Ray on this machine has taken those, and without its agent
# port a node starts but never takes a job.
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")


class Head:
    """A head node with a dashboard, in a separate process group and folder, on free ports."""

    def __init__(self, folder: Path, *options: str, cpus: int = 3, **environment: str) -> None:
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.folder, self.log = folder, folder / "head.log"
        self.gcs = f"127.0.0.1:{ports['port']}"
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = os.environ | self.token | environment
        command = [str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}", f"--temp-dir={folder}"]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000"]
        command += [*(f"--{name}={port}" for name, port in ports.items()), *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, seconds: float = 300) -> None:
        """Wait until the node accepts jobs: the dashboard answers before its agent does."""
        deadline = time.monotonic() + seconds
        while (tried := self.job("submit", "--", "true")).returncode:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text() + tried.stdout + tried.stderr
            time.sleep(0.5)

    def stop(self) -> None:
        """Kill the node: there is nothing to keep, and workers end with their raylet."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def job(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), "job", arguments[0], "--address", self.address, *arguments[1:]]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )
