"""Connecting to Ray: attempts are printed at once, failures explained in full, and no files left behind."""

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cliper.jobs import session
from cliper.jobs.session import explain_ray, ray_session
from cliper.pipeline.errors import ResourceError
from tests.conftest import PHOTOS
from tests.support.command import CLIPER


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def refusal(monkeypatch: pytest.MonkeyPatch, address: str, seconds: float = 2.0) -> str:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(session, "CONNECT_SECONDS", seconds)
    with ray_session(verbose=False) as opened, pytest.raises(ResourceError) as caught:
        opened.connect()
    return str(caught.value)


def test_an_address_that_does_not_answer_times_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "SAY_EVERY", 0.5)
    began = time.monotonic()
    message = refusal(monkeypatch, "127.0.0.1:1")
    assert time.monotonic() - began < 10
    assert message.startswith(
        "no Ray answers at RAY_ADDRESS=127.0.0.1:1 after 2 s (Connection refused); start the"
    )
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "connecting to Ray at 127.0.0.1:1 (RAY_ADDRESS)"
    assert second == "no answer yet from 127.0.0.1:1, 1 s left: Connection refused"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://head:8265", "is for jobs. Submit the command .*or connect to .*RAY_ADDRESS=head:6379"),
        ("ray://head:10001", "ray:// is not supported; use HOST:PORT"),
        ("head", "expected HOST:PORT of the head, e.g. head:6379"),
        ("no-such-host.invalid:6379", "no Ray answers at RAY_ADDRESS=no-such-host.invalid:6379 after 0.1 s"),
    ],
)
def test_addresses_that_cannot_be_right(monkeypatch: pytest.MonkeyPatch, address: str, message: str) -> None:
    assert re.search(message, refusal(monkeypatch, address, 0.1))


def test_a_port_of_another_program(silent_port: int, tmp_path: Path) -> None:
    """Ray would try for 13 minutes; its timeout for one attempt is shortened here."""
    environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{silent_port}", "RAY_py_gcs_connect_timeout_s": "2"}
    command = [CLIPER, "label", "--input", str(PHOTOS), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "Ray cannot be reached at RAY_ADDRESS=127.0.0.1:" in done.stderr
    assert "check the host and the port: a head's default is 6379" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_version_mismatch_names_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private.utils import check_version_info

    cluster = {"ray_version": "2.1.0", "python_version": "3.8.0"}
    with pytest.raises(RuntimeError) as caught:
        check_version_info(cluster, "this process")
    message = explain_ray(caught.value, "head:6379")
    assert "\n" not in message
    assert all(version in message for version in ("2.1.0", "3.8.0", ray.__version__))
    assert message.endswith("install the cluster's Ray and Python here, or submit the command as a job")


def test_errors_of_the_cluster_stay_off_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Ray prints them on stdout, e.g. those of tasks that Ctrl-C has cancelled."""
    from ray._private.worker import print_to_stdstream

    line = {"lines": ["Task load_shard failed, so the task will be retried."], "pid": "raylet", "is_err": False}
    with session._quiet():
        print_to_stdstream(line, ignore_prefix=False)
    assert capsys.readouterr().out == ""
    print_to_stdstream(line | {"lines": ["Another"]}, ignore_prefix=False)
    assert "Another" in capsys.readouterr().out
