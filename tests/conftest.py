"""Fixtures that several files share: tiny weights, photographs, a real S3 server, a real Ray."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support.hub import Hub, connected

ROOT = Path(__file__).parent.parent
PARITY = ROOT / "tests" / "data" / "parity"
PHOTOS = ROOT / "examples" / "photos"

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # under a shell's `&`, also in child processes
    signal.signal(signal.SIGINT, signal.default_int_handler)


# These take minutes and go first, so that the workers of a parallel run end together.
LONG = (
    *("cli", "evaluate", "flow", "sharing", "clusters", "ray_job", "faults", "tutorial", "docs", "failed"),
    *("label_control", "session", "stage_gains", "wheel", "demo"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}" for name in LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder: the recorded vision tower with a seeded random text tower."""
    import torch
    from safetensors.torch import load_file, save_file

    from cliper.model._libraries import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = json.loads((PARITY / "clip_tiny.json").read_text())
    torch.manual_seed(0)
    state = open_clip.model.CLIP(**config).state_dict()
    state |= {name: value.float() for name, value in load_file(PARITY / "clip_tiny.safetensors").items()}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A local model hub that huggingface_hub uses instead of the real one, with an empty cache."""
    server = Hub()
    with connected(monkeypatch, server.endpoint, tmp_path / "hub-cache"):
        yield server
    server.close()


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """The recorded photographs, uint8 RGB."""
    return [np.array(Image.open(path).convert("RGB")) for path in sorted((PARITY / "photos").glob("*.png"))]


@pytest.fixture(scope="session")
def _ray_ends() -> Iterator[None]:
    import ray

    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_local(_ray_ends: None) -> None:
    """A Ray with four logical CPUs, regardless of the machine; files share it, unless one needed another Ray."""
    import ray

    if ray.is_initialized():
        return
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=400_000_000,
        logging_level="ERROR",
    )


@pytest.fixture(scope="session")
def settings(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A config and a class file for the recorded weights."""
    folder = tmp_path_factory.mktemp("settings")
    config = {
        "model": {
            "backbone": {"model": f"local-dir:{tiny_clip}"},
            "fusion": {"short_side": 64},
            "prompts": {"templates": ["a photo of a {}."]},
            "fgc": None,
            "labels": {"presence_threshold": 0.1, "background_threshold": 0.1},
        },
        "shard": {"images": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "classes.txt").write_text("cat\ncup = a cup of coffee\nperson\nrocket\n")
    return {"--config": str(folder / "config.yaml"), "--classes": str(folder / "classes.txt")}


class S3Server:
    """`rclone serve s3` over a local folder, with a key pair."""

    key, secret = "TESTKEY", "TESTSECRET"

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.endpoint = folder, f"http://127.0.0.1:{port}"
        command = [str(Path(sys.executable).parent / "rclone"), "serve", "s3", str(folder)]
        command += ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{self.key},{self.secret}"]
        # Not 0: rclone then does nothing but clean its cache, on one core, from the first write on.
        command += ["--config", os.devnull, "--vfs-cache-mode", "off", "--dir-cache-time", "5ms"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self._wait(port)

    def _wait(self, port: int) -> None:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError("rclone did not start")

    @property
    def options(self) -> dict[str, str]:
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint}

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that a user would export."""
        names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
        return dict(zip(names, (self.endpoint, self.key, self.secret, "us-east-1"), strict=True))

    def bucket(self, name: str) -> str:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        time.sleep(0.05)  # until the server's listing cache expires
        return f"s3://{name}"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate disk of one megabyte; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
