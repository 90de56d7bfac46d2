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


def test_it_labels_without_a_home_among_modules_of_its_names(installed: Path, tmp_path: Path) -> None:
    """As in a container of another user. Python looks in the current folder first, and so do Ray's workers."""
    trap = f"import pathlib; pathlib.Path({str(tmp_path / 'imported')!r}).touch(); raise RuntimeError('imported')"
    for name in ("pipeline.py", "jobs/__init__.py", "configs/__init__.py", "cliper_model/__init__.py", "tools.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(trap)
    (tmp_path / "classes.txt").write_text("grass\nwater\n")
    places = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(installed)])}
    where = run(tmp_path, sys.executable, "-c", "import cliper; print(cliper.__file__)", **places)
    assert Path(where.strip()).is_relative_to(installed)
    label = ("label", "--input", str(PHOTOS), "--output", "run", "--classes", "classes.txt")
    run(tmp_path, sys.executable, "-m", "cliper.jobs.cli", *label, **places, HOME="/proc/no-home")
    rows = [row for path in (tmp_path / "run" / "labels").iterdir() for row in pq.read_table(path).to_pylist()]
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert not (tmp_path / "imported").exists()
