"""The wheel: built, installed into another folder, and used outside the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import PHOTOS, ROOT


def run(folder: Path, *command: str, **environment: str) -> str:
    # Another test's Ray may have left its way of authentication in the environment.
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        command, cwd=folder, env=known | environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel's files were installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", ".", str(ROOT))
    run(folder, sys.executable, *build)
    [wheel] = folder.glob("cliper-*.whl")
    assert wheel.stat().st_size < 25e6
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", "site", wheel.name)
    run(folder, sys.executable, *install)
    return folder / "site"


def test_it_holds_the_packages_and_nothing_else(installed: Path) -> None:
    found = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert found - {"bin"} == {"cliper"}


def test_it_labels_a_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("grass\nwater\n")
    where = run(tmp_path, sys.executable, "-c", "import cliper; print(cliper.__file__)", PYTHONPATH=str(installed))
    assert Path(where.strip()).is_relative_to(installed)
    label = ("label", "--input", str(PHOTOS), "--output", "run", "--classes", "classes.txt")
    # Without a home directory, as in a container of another user.
    command = (sys.executable, "-m", "cliper.jobs.cli", *label)
    run(tmp_path, *command, PYTHONPATH=str(installed), HOME="/proc/no-home")
    rows = [row for path in (tmp_path / "run" / "labels").iterdir() for row in pq.read_table(path).to_pylist()]
    assert [row["status"] for row in rows] == ["ok"] * 4
