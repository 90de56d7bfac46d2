"""`cliper export --push` against a server that speaks the hub's upload protocol."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cliper.jobs.cli import app
from cliper.model.errors import CliperError
from cliper.pipeline.run.folder import Run
from tests.support.export_runs import scenes, scripted_run
from tests.support.hub import MEMBER, STRANGER, Hub, connected, folder_files

NAME = "datasets/owner/masks"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    served = Hub()
    with connected(monkeypatch, served.endpoint, tmp_path / "hub-cache"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the server has LFS only
        monkeypatch.setattr("cliper.pipeline.export.hub.PAUSE", 0.01)
        monkeypatch.setenv("HF_TOKEN", MEMBER)
        yield served
    served.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return scripted_run(tmp_path_factory.mktemp("push"), scenes(8), shard={"images": 4})


def push(run: Run, folder: Path, *more: str, to: str = "huggingface") -> str:
    """The command's output. Raises its error."""
    command = ["export", run.uri, "--to", to, "--output", str(folder), "--workers", "1", "--push", "owner/masks"]
    done = CliRunner().invoke(app, [*command, *more])
    assert MEMBER not in done.output
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_a_push_holds_the_exported_files(hub: Hub, run: Run, tmp_path: Path) -> None:
    assert f"pushed    {hub.endpoint}/{NAME}" in push(run, tmp_path / "a", "--private")
    repository = hub.repositories[NAME]
    assert repository.private
    exported = {k: v for k, v in folder_files(tmp_path / "a").items() if not k.startswith("cliper-")}
    assert repository.commits[repository.branches["main"]] == exported | {".gitattributes": b""}
    assert sum(name.endswith(".parquet") for name in exported) == 2

    push(run, tmp_path / "b", "--private", "--val-share", "0.5")  # the first data files are replaced
    files = repository.commits[repository.branches["main"]]
    assert {name for name in files if name.startswith("data/")} == {
        name for name in folder_files(tmp_path / "b") if name.startswith("data/")
    }


def test_a_commit_that_fails_is_repeated_a_bounded_number_of_times(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.failures = 2
    push(run, tmp_path / "a")
    commits = [path for method, path, _ in hub.requests if method == "POST" and "/commit/" in path]
    assert (hub.failures, len(commits)) == (0, 3)
    uploads = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(uploads) == len(hub.objects)  # once each
    hub.failures = 100
    with pytest.raises(CliperError, match="answers with error 503 for 'owner/masks'; run the same command again"):
        push(run, tmp_path / "b", "--val-share", "0.5")


def test_an_impossible_push_is_refused_before_the_export(
    hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CliperError, match="of the format huggingface"):
        push(run, tmp_path / "out", to="coco")
    push(run, tmp_path / "public")
    with pytest.raises(CliperError, match="exists and is public; leave --private out"):
        push(run, tmp_path / "out", "--private")
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(CliperError, match="refuses to write to 'owner/other'"):
        push(run, tmp_path / "out", "--push", "owner/other")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CliperError, match="set HF_TOKEN, or run 'hf auth login'"):
        push(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
