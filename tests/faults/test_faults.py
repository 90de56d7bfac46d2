"""Faults on a small corpus; `make faults` has all of them. Drivers run on the session's Ray."""

import http.client
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cliper.pipeline.storage.backend import Storage
from tests.conftest import S3Server
from tests.faults.place import Place, local_place
from tests.faults.proxy import FAULTS, FlakyProxy
from tests.faults.scenarios import SCENARIOS, Setting


@pytest.fixture
def ray_address(ray_local: None) -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return local_place(tmp_path / "disk")


@pytest.fixture
def on_s3(s3: S3Server, tmp_path: Path) -> Iterator[Place]:
    yield Place("s3", s3.bucket("faults"), s3.folder / "faults", s3.options)


@pytest.mark.parametrize("fault", FAULTS)
def test_storage_survives_a_third_of_its_requests_broken(fault: str, s3: S3Server) -> None:
    bucket = s3.bucket("proxy")
    Storage(s3.options).write(f"{bucket}/a", b"x" * 1000)
    with FlakyProxy(s3.endpoint, 0.33, seed=1, faults=(fault,)) as proxy:
        options = {"endpoint_url": proxy.endpoint, "config_kwargs": {"read_timeout": 1}}
        storage = Storage(s3.options | options)
        while not proxy.injected[fault]:
            assert storage.read(f"{bucket}/a") == b"x" * 1000
            storage.write(f"{bucket}/a", b"x" * 1000)


BREAKS: dict[str, type[Exception]] = {  # as seen by a client without retries
    "reset": ConnectionResetError,
    "answer_lost": ConnectionResetError,
    "stall": TimeoutError,
    "truncated": http.client.IncompleteRead,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proxy_injects_every_fault(fault: str, s3: S3Server) -> None:
    with FlakyProxy(s3.endpoint, 1.0, seed=1, faults=(fault,)) as proxy:
        host, port = proxy.endpoint.removeprefix("http://").split(":")
        client = http.client.HTTPConnection(host, int(port), timeout=3)
        client.request("GET", "/")  # without a signature: the server answers with an error and a body
        if fault == "slow_down":
            answer = client.getresponse()
            assert (answer.status, b"SlowDown" in answer.read()) == (503, True)
        else:
            with pytest.raises(BREAKS[fault]):
                client.getresponse().read()
        assert proxy.injected[fault] == proxy.requests == 1
        client.close()


SHORT = {  # images, times the fault strikes
    "driver killed": (160, 2),
    "actor or writer killed": (400, 3),
}


@pytest.mark.parametrize("fault", SHORT)
def test_nothing_is_lost_or_doubled(fault: str, local: Place, ray_address: str) -> None:
    images, times = SHORT[fault]
    outcome = SCENARIOS[fault](Setting(local, images, times, 7, ray_address, os.getpid()))
    assert outcome.count.clean, outcome
    if fault == "actor or writer killed":
        assert outcome.detail["actors_killed"] > 0


def test_a_tenth_of_the_requests_broken(on_s3: Place, ray_address: str) -> None:
    outcome = SCENARIOS["10% of requests broken"](Setting(on_s3, 100, 1, 7, ray_address, os.getpid()))
    assert outcome.count.clean, outcome
    assert outcome.detail["broken"] > 0


def test_a_node_lost_and_one_added(local: Place) -> None:
    outcome = SCENARIOS["node lost and added"](Setting(local, 200, 1, 7))
    assert outcome.count.clean, outcome
