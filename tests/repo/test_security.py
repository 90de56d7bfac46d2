"""The promises of SECURITY.md that no other test covers."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cliper.model import CLIPer, CLIPerConfig
from cliper.model.errors import CliperError
from cliper.pipeline.run.folder import read_run
from cliper.pipeline.run.rows import read_tables
from cliper.pipeline.storage.backend import Storage
from tests.conftest import ROOT, S3Server
from tests.support.fakes import CLASSES, jpeg


class Evil:
    """Unpickling this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def test_weights_are_never_unpickled(tiny_clip: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "weights", tmp_path / "ran"
    folder.mkdir()
    (folder / "open_clip_config.json").write_bytes((tiny_clip / "open_clip_config.json").read_bytes())
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil(marker)}))
    backbone = {"model": f"local-dir:{folder}"}
    with pytest.raises((CliperError, pickle.UnpicklingError)):
        CLIPer.load(CLIPerConfig.model_validate({"backbone": backbone, "fgc": None}), CLASSES)
    assert not marker.exists()


def labeled(arguments: list[str], address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.driver", "label", *arguments],
        cwd=ROOT,
        env=os.environ | known | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def ray_address(ray_local: None) -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    (tmp_path / "config.yaml").write_text("{segmenter: brightness, resources: {actors: 1, cpus_per_actor: 1}}")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES.names))
    return ["--config", str(tmp_path / "config.yaml"), "--classes", str(tmp_path / "classes.txt")]


def test_names_in_an_archive_cannot_leave_the_run_folder(
    tmp_path: Path, config: list[str], ray_address: str
) -> None:
    """They become image ids, which are only data: no file is named after one."""
    names = ["../../../escaped.jpg", "/absolute/escaped.jpg", "a/../../escaped.jpg", "good.jpg"]
    place = tmp_path / "deep" / "place"
    place.mkdir(parents=True)
    with tarfile.open(place / "corpus.tar", "w") as archive:
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(jpeg(i))
            archive.addfile(member, io.BytesIO(jpeg(i)))
    before = set(tmp_path.rglob("*"))
    run = place / "run"
    done = labeled(["--input", str(place / "corpus.tar"), "--output", str(run), *config], ray_address)
    assert done.returncode == 0, done.stderr
    outside = {path for path in set(tmp_path.rglob("*")) - before if run not in (path, *path.parents)}
    assert not outside
    assert not any("escaped" in path.name for path in run.rglob("*"))
    [table] = read_tables(read_run(str(run), Storage()))
    assert table.column("image_id").to_pylist() == [f"corpus/{name}" for name in names]
    assert set(table.column("status").to_pylist()) == {"ok"}


def files_with(secret: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_keys_are_in_no_file_and_no_output(
    tmp_path: Path, config: list[str], s3: S3Server, ray_address: str
) -> None:
    """Keys as options, a run that succeeds and one that fails, everything printed: not in Ray's logs either."""
    from ray._private.worker import global_worker

    bucket = s3.bucket("keys")
    (s3.folder / "keys" / "photos").mkdir()
    (s3.folder / "keys" / "photos" / "good.jpg").write_bytes(jpeg(1))
    (s3.folder / "keys" / "photos" / "bad.jpg").write_bytes(b"not an image")
    options = [part for pair in s3.options.items() for part in ("--storage-option", "=".join(pair))]
    command = ["--input", f"{bucket}/photos", "--output", f"{bucket}/run", *config, "--verbose", *options]
    done = labeled(command, ray_address)
    assert done.returncode == 0, done.stderr
    other = "AnotherSecret"  # of a run that fails
    refused = labeled([*command, "--storage-option", f"secret={other}"], ray_address)
    assert refused.returncode == 2, refused.stderr
    for secret in (s3.secret, other):
        for text in (done.stdout, done.stderr, refused.stdout, refused.stderr):
            assert secret not in text
        assert files_with(secret, s3.folder) == []
        logs = Path(global_worker.node.get_session_dir_path()) / "logs"
        assert any(logs.iterdir())
        assert files_with(secret, logs) == []


def test_ray_remembers_a_drivers_command_line(ray_address: str) -> None:
    """Why SECURITY.md says to prefer environment variables; if this fails, that advice can go."""
    import ray

    code = "import sys, ray; ray.init(logging_level='ERROR', log_to_driver=False)"
    subprocess.run(
        [sys.executable, "-c", code, "--storage-option", "secret=OnTheCommandLine"],
        env=os.environ | {"RAY_ADDRESS": ray_address},
        check=True,
        timeout=120,
    )
    from ray._private.worker import global_worker

    jobs = global_worker.gcs_client.get_all_job_info()
    assert any("OnTheCommandLine" in job.entrypoint for job in jobs.values()), ray.__version__
