"""The tutorial and the recipes run as written, in order, with fewer images; the CLI page is current."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cliper.pipeline.telemetry import METRICS
from tests.conftest import PHOTOS, ROOT, S3Server
from tests.support.command import cliper_here
from tools.cli_reference import PAGE, reference

TUTORIAL, RECIPES = ROOT / "docs" / "TUTORIAL.md", ROOT / "docs" / "RECIPES.md"

# The only differences between the pages and the commands run here: fewer images.
FEWER = {"--count 240": "--count 6", "--count 60": "--count 2", "--count 20": "--count 3"}
SHORT = ["--heldout", "2", "--epochs", "2"]  # added to examples.student


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder that looks like the repository to a command."""
    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def environment(ray_local: None) -> dict[str, str]:
    """Commands share the tests' Ray, as they would share a cluster."""
    import ray

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ray_address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return os.environ | ray_address | {"PATH": path, "PYTHONPATH": str(ROOT)}


def command_line(line: str) -> list[str]:
    for many, few in FEWER.items():
        line = line.replace(many, few)
    return shlex.split(line) + (SHORT if "examples.student" in line else [])


def follow(page: Path, home: Path, environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Run a page block by block; yields (command, its output) before each next one.

    bash is run line by line; a python, text or yaml block that begins with `# NAME` becomes that file, other
    python is run. console blocks are not run.
    """
    for language, text in blocks(page):
        name = re.match(r"# ([\w.]+)\n", text)
        if name and language in ("python", "text", "yaml"):
            (home / name[1]).write_text(text)
        elif language == "python":
            yield text, run([sys.executable, "-c", text], home, environment)
        elif language == "bash":
            for line in text.splitlines():
                # S3 keys are in the command's environment: workers of a Ray that runs already would not have them.
                dropped = "RAY_ADDRESS" if "s3://" in line else ""
                known = {key: value for key, value in environment.items() if key != dropped}
                yield line, run(command_line(line), home, known)


ON_RAY = ("label", "evaluate", "plan", "retry")


def run(command: list[str], home: Path, environment: dict[str, str]) -> str:
    """Run a command in `home`; one of cliper's that needs no Ray runs in this process, which is faster."""
    if command[0] == "cliper" and command[1] not in ON_RAY:
        with contextlib.chdir(home):
            # Ray is for one connection a process, which is the tests' own.
            done = cliper_here(*command[1:], **{k: v for k, v in environment.items() if k != "RAY_ADDRESS"})
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout
    done = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.timeout(1800)
def test_the_tutorial(home: Path, environment: dict[str, str]) -> None:
    shown: dict[str, str] = {}
    for line, output in follow(TUTORIAL, home, environment):
        shown[line.partition(" build")[0]] = output
        if line.startswith("cliper review pick"):
            export_from_label_studio(home / "build" / "tutorial" / "review")
    assert "labeled   6 images" in shown["cliper label --input"]
    assert "torch.Size([4, 3, 256, 256]) torch.uint8 torch.Size([4, 256, 256]) torch.int64" in "".join(
        shown.values()
    )
    assert "picked    3 images" in shown["cliper review pick"]
    assert "reviewed  3 images: 1 changed, 2 confirmed" in shown["cliper review apply"]
    assert (home / "build/tutorial/report.html").stat().st_size > 10_000
    assert len(list((home / "build/tutorial/voc/VOCdevkit/VOC2012/SegmentationClass").glob("*.png"))) == 6
    student = shown["python -m examples.student --run"]
    assert re.search(r"teacher   [\d.]+ mIoU on 2 held-out scenes\nstudent   [\d.]+ mIoU", student)
    assert (home / "build/tutorial/student/student.pt").is_file()


def export_from_label_studio(folder: Path) -> None:
    """A simulated export of the editor: predictions as annotations, with a brush removed in one of them."""
    tasks = json.loads((folder / "tasks.json").read_text())
    for i, task in enumerate(tasks):
        regions = task.pop("predictions")[0]["result"][1 if i == 0 else 0 :]
        when = {"completed_by": 1, "updated_at": "2026-03-01T12:00:00Z"}
        task["annotations"] = [when | {"result": regions}]
    (folder / "export.json").write_text(json.dumps(tasks))


@pytest.mark.timeout(1800)
def test_the_recipes(home: Path, environment: dict[str, str], s3: S3Server) -> None:
    s3.bucket("bucket")
    (s3.folder / "bucket" / "photos").mkdir()
    for name in ("astronaut.jpg", "chelsea.jpg"):
        (s3.folder / "bucket" / "photos" / name).write_bytes((PHOTOS / name).read_bytes())
    shown = dict(follow(RECIPES, home, environment | s3.environment))
    assert "labeled   2 images" in shown[next(line for line in shown if "s3://bucket/photos" in line)]
    assert "folder: 2 images, 19 classes" in "".join(shown.values())
    assert "mIoU" in shown["cliper evaluate --run build/own-run --data build/own-prepared"]
    assert "model     excess green\nlabeled   4 images" in "".join(shown.values())
    areas = (home / "build" / "plants-areas" / "areas.csv").read_text().splitlines()
    assert areas[0] == "image_id,background,plant"
    assert len(areas) == 5
    assert all(abs(float(line.split(",")[1]) + float(line.split(",")[2]) - 1) < 1e-3 for line in areas[1:])


@pytest.mark.parametrize("page", [TUTORIAL, RECIPES], ids=lambda page: page.name)
def test_commands_for_other_machines_name_options_that_exist(page: Path) -> None:
    from cliper.jobs.cli import load

    lines = [line for language, text in blocks(page) if language == "console" for line in text.splitlines()]
    for line in lines:
        command = re.search(r"(?:^\$|--) (cliper .*)", line)
        if command is None:
            continue
        _, name, *words = shlex.split(command[1])
        options = {option for parameter in load(name).params for option in parameter.opts}
        assert not [word for word in words if word.startswith("--") and word not in options], line


def test_the_recipes_name_every_metric() -> None:
    text = RECIPES.read_text(encoding="utf-8")
    assert set(re.findall(r"ray_(cliper_\w+)", text)) == set(METRICS)


def test_the_cli_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m tools.cli_reference"
