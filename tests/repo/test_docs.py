"""The README stays correct: its commands and code are run, its links and make targets exist."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PHOTOS, ROOT, S3Server

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository to a command."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def environment(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    s3.bucket("bucket")
    (s3.folder / "bucket" / "photos").mkdir()
    for photo in PHOTOS.glob("*.jpg"):
        (s3.folder / "bucket" / "photos" / photo.name).write_bytes(photo.read_bytes())
    cache = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path_factory.mktemp("cache"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    yield os.environ | s3.environment | cache | {"PATH": path, "PYTHONPATH": str(ROOT)}


def commands() -> list[str]:
    """Every shell command shown; of a submitted job, the command it submits."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]
    return [line.partition(" -- ")[2] if line.startswith("ray job submit") else line for line in lines]


@pytest.mark.parametrize("command", list(dict.fromkeys(commands())))
def test_commands_of_the_readme_work(command: str, home: Path, environment: dict[str, str]) -> None:
    """Real weights need a network: the command must reach the point of loading them."""
    done = subprocess.run(
        shlex.split(command), cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    if "--config vit-" in command:
        assert done.returncode == 2, done.stderr
        assert "is not in the cache" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


def test_python_of_the_readme_reads_the_run(home: Path, environment: dict[str, str]) -> None:
    code = "\n".join(blocks("python"))
    assert (home / "build/photos/labels").is_dir(), "the first command writes it"
    code += "\nfrom datasets import load_dataset\nprint(mask.shape)\n"
    code += re.search(r"`(load_dataset\(.*?\))`", README)[1]  # type: ignore[index]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(512, 512)"


def test_the_notebook_runs(home: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the README's first command, in a kernel of its own; the stored outputs stay small."""
    import nbformat
    from nbclient import NotebookClient

    path = ROOT / "examples" / "python.ipynb"
    assert path.stat().st_size < 100_000
    for name in ("PYTHONPATH", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, environment[name])
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(home)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "image/png" in outputs[1 if outputs[0].output_type == "stream" else 0].data
    assert outputs[-1].data["text/plain"] == "4"


def test_class_file_shown_is_the_example() -> None:
    assert blocks("text")[0] == (ROOT / "examples" / "classes.txt").read_text()


def test_every_shipped_label_config_is_listed() -> None:
    for path in (ROOT / "configs" / "label").glob("*.yaml"):
        assert f"`{path.stem}`" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_a_target(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`?\bmake ([a-z][a-z-]+)`", page.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page.name} names make {target}"


def shown(page: Path) -> list[str]:
    """The `cliper` commands in a page's indented blocks, comments cut off."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.startswith("    cliper ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_indented_commands_name_options_and_configs_that_exist(page: Path) -> None:
    """These need downloads to run; their words are checked against the commands themselves."""
    from cliper.jobs.cli import load
    from cliper.pipeline.config import shipped

    for line in shown(page):
        _, name, *words = shlex.split(line)
        options = {option for parameter in load(name).params for option in parameter.opts}
        unknown = [word for word in words if word.startswith("--") and word not in options]
        assert not unknown, f"{page.name}: `{line}` has {unknown}"
        if name == "evaluate" and not words[0].startswith("--"):
            assert words[0] in shipped("benchmarks"), line
