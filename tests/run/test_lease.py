"""One driver at a time: real processes and files, a real S3 server without conditions, a small one with."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from cliper.pipeline.errors import LeaseError
from cliper.pipeline.run import lease
from cliper.pipeline.run.lease import Holder, hold
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.conditional import decides, read_versioned, write_if
from cliper.pipeline.storage.uris import join
from tests.conftest import ROOT, S3Server
from tests.support.faulty_s3 import FaultyS3

LOCAL = Storage()
HOLD = """
import sys, time
from cliper.pipeline.run.lease import hold
from cliper.pipeline.storage.backend import Storage
with hold(sys.argv[1], Storage()):
    print("held", flush=True)
    time.sleep(600)
"""


def holding(uri: str) -> "subprocess.Popen[str]":
    """Another process that holds the lease of a local folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, uri], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def write_lease(uri: str, storage: Storage = LOCAL, **changes: object) -> Holder:
    """The lease of a driver on another machine."""
    holder = replace(Holder.me(1.0), id="other", machine="elsewhere", host="far", **changes)  # type: ignore[arg-type]
    file, outcome = join(uri, "lease.json"), "refused"
    while outcome == "refused":  # the holder may be renewing at the same moment
        found = read_versioned(storage, file)
        outcome = write_if(storage, file, holder.encode(), found and found[1])
    return holder


@pytest.fixture
def strict_s3() -> Iterator[FaultyS3]:
    """An S3 server that honours If-None-Match and If-Match, as AWS does."""
    with FaultyS3() as server:
        yield server


def test_the_lease_names_its_holder_and_is_removed(tmp_path: Path) -> None:
    with hold(str(tmp_path), LOCAL):
        content = json.loads((tmp_path / "lease.json").read_text())
        assert (content["pid"], content["host"]) == (os.getpid(), socket.gethostname())
        assert content["since"].endswith("+00:00")
    assert not list(tmp_path.iterdir())


def test_released_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(str(tmp_path), LOCAL):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_a_living_driver_is_not_disturbed_and_a_killed_one_is_replaced_at_once(tmp_path: Path) -> None:
    other = holding(str(tmp_path))
    with (
        pytest.raises(LeaseError, match=f"is in use by process {other.pid} on {socket.gethostname()}, since"),
        hold(str(tmp_path), LOCAL),
    ):
        pass
    assert other.poll() is None
    other.send_signal(signal.SIGKILL)
    time.sleep(0.2)
    assert other.returncode is None  # still a zombie, as under an init that reaps late: dead all the same
    with hold(str(tmp_path), LOCAL):
        assert Holder.parse((tmp_path / "lease.json").read_bytes()).pid == os.getpid()
    other.wait()


def test_a_silent_driver_on_another_machine_is_replaced_after_its_lifetime(tmp_path: Path) -> None:
    """The other machine's clock is years ahead, which must not matter."""
    write_lease(str(tmp_path), renewed="2099-01-01T00:00:00+00:00")
    with hold(str(tmp_path), LOCAL):
        assert Holder.parse((tmp_path / "lease.json").read_bytes()).pid == os.getpid()


def test_a_living_driver_on_another_machine_is_detected(tmp_path: Path) -> None:
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.05):
            write_lease(str(tmp_path), renewed=str(time.monotonic()))

    write_lease(str(tmp_path), ttl_seconds=600.0)  # the watcher must not wait that long
    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(LeaseError, match="is in use by process"), hold(str(tmp_path), LOCAL):
            pass
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"id": 3}'])
def test_a_damaged_lease_expires_like_any_other(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "TTL_SECONDS", 1.0)
    (tmp_path / "lease.json").write_bytes(content)
    with hold(str(tmp_path), LOCAL):
        assert Holder.parse((tmp_path / "lease.json").read_bytes()).pid == os.getpid()


def test_a_driver_that_was_taken_over_stops(tmp_path: Path) -> None:
    with (
        pytest.raises(LeaseError, match="it was taken over by process .* on far"),
        hold(str(tmp_path), LOCAL, 0.3),
    ):
        write_lease(str(tmp_path))
        time.sleep(60)
    assert Holder.parse((tmp_path / "lease.json").read_bytes()).id == "other"  # not removed


def test_a_removed_lease_stops_the_driver(tmp_path: Path) -> None:
    with pytest.raises(LeaseError, match="its lease.json was removed"), hold(str(tmp_path), LOCAL, 0.3):
        (tmp_path / "lease.json").unlink()
        time.sleep(60)


def test_renewed_for_as_long_as_it_is_held(tmp_path: Path) -> None:
    with hold(str(tmp_path), LOCAL, 0.15):
        first = (tmp_path / "lease.json").read_bytes()
        end = time.monotonic() + 60
        while (tmp_path / "lease.json").read_bytes() == first:
            assert time.monotonic() < end
            time.sleep(0.02)


def race(uri: str, storage: Storage, drivers: int) -> int:
    """Let `drivers` threads replace the current lease at the same moment; returns the number that succeeded."""
    start = threading.Barrier(drivers)

    def write(number: int) -> bool:
        found = read_versioned(storage, uri)
        start.wait()
        return write_if(storage, uri, uuid.uuid4().bytes, found and found[1]) == "done"

    with ThreadPoolExecutor(drivers) as pool:
        return sum(pool.map(write, range(drivers)))


def test_one_of_many_wins_on_a_local_disk(tmp_path: Path) -> None:
    for _ in range(20):
        assert race(str(tmp_path / "lease.json"), LOCAL, 8) == 1


def test_one_of_many_wins_on_s3_with_conditions(strict_s3: FaultyS3) -> None:
    storage, uri = Storage(strict_s3.options), "s3://bucket/run/lease.json"
    for drivers in (20, 6, 6):  # the first creates, the others replace
        assert race(uri, storage, drivers) == 1
    storage.write(uri, b"mine")
    assert decides(storage, uri, b"mine")
    with hold("s3://bucket/other", storage):
        assert [name for name, _ in storage.list_files("s3://bucket/other")] == ["lease.json"]


def test_a_repeated_put_is_not_mistaken_for_a_rival(strict_s3: FaultyS3) -> None:
    """The first PUT succeeds but its answer is lost; the client's retry is refused because of the first."""
    strict_s3.fail("PUT", "lease.json", "lost answer", times=1)
    storage = Storage(strict_s3.options)
    with hold("s3://bucket/run", storage):
        assert strict_s3.struck()
        assert Holder.parse(storage.read("s3://bucket/run/lease.json")).pid == os.getpid()
    assert not storage.exists("s3://bucket/run/lease.json")


def test_s3_without_conditions_reads_back(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 1.0)
    run, storage = f"{s3.bucket('leases')}/run", Storage(s3.options)
    storage.write(f"{run}/lease.json", b"{}")
    assert not decides(storage, f"{run}/lease.json", b"{}")
    storage.remove(f"{run}/lease.json")

    def overwrite() -> None:  # a rival that read before our lease was written
        while read_versioned(storage, f"{run}/lease.json") is None:
            time.sleep(0.01)
        time.sleep(0.3)
        write_lease(run, storage)

    rival = threading.Thread(target=overwrite)
    rival.start()
    with hold(run, storage):  # the rival's lease stands, and is silent
        rival.join()
        found = read_versioned(storage, f"{run}/lease.json")
        assert found is not None
        assert Holder.parse(found[0]).pid == os.getpid()
    assert read_versioned(storage, f"{run}/lease.json") is None
