"""Run folders: identity, refusal, resume planning."""

from pathlib import Path

import pytest

from cliper_model.classes import ClassList
from pipeline.config import JobConfig, ShardConfig
from pipeline.errors import RunError
from pipeline.manifest import write_manifest
from pipeline.run import fingerprint, identity_of, open_run, read_run
from pipeline.sources import Entry
from pipeline.storage import Storage

LOCAL = Storage({"secret": "hunter2"})
CLASSES = ClassList.parse(["cat", "dog"])


def identity(classes: ClassList = CLASSES, **model: object) -> dict[str, object]:
    return identity_of(JobConfig.model_validate({"model": model}), classes, "/in", {"backbone": "abc"})


def test_same_identity_continues(tmp_path: Path) -> None:
    first = open_run(str(tmp_path / "run"), LOCAL, identity())
    again = open_run(str(tmp_path / "run"), LOCAL, identity())
    assert first.fingerprint == again.fingerprint == read_run(str(tmp_path / "run"), LOCAL).fingerprint
    assert "hunter2" not in (tmp_path / "run" / "run.json").read_text()


def test_other_settings_are_refused_by_key(tmp_path: Path) -> None:
    open_run(str(tmp_path), LOCAL, identity())
    with pytest.raises(RunError, match=r"model.labels.presence_threshold was 0.3, is now 0.5"):
        open_run(str(tmp_path), LOCAL, identity(labels={"presence_threshold": 0.5}))
    with pytest.raises(RunError, match=r"classes.2 was \"dog\", is now \"fox\""):
        open_run(str(tmp_path), LOCAL, identity(ClassList.parse(["cat", "fox"])))


def test_resources_are_no_part_of_the_identity() -> None:
    one = identity_of(JobConfig.model_validate({"resources": {"actors": 1}}), CLASSES, "/in", {})
    two = identity_of(JobConfig.model_validate({"resources": {"actors": 2}}), CLASSES, "/in", {})
    assert fingerprint(one) == fingerprint(two)


def test_class_order_is_part_of_the_identity(tmp_path: Path) -> None:
    """The same names in another order are other labels."""
    open_run(str(tmp_path), LOCAL, identity(ClassList.parse(["cat", "dog"])))
    with pytest.raises(RunError, match=r"classes.1 was \"cat\", is now \"dog\"; classes.2 was"):
        open_run(str(tmp_path), LOCAL, identity(ClassList.parse(["dog", "cat"])))


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"is not empty and not a run folder \(it holds thesis.tex\)"):
        open_run(str(tmp_path), LOCAL, identity())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match=r"it has no run.json"):
        read_run(str(tmp_path), LOCAL)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"identity": 3', "null"])
def test_damaged_run_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match="is not a run's identity"):
        open_run(str(tmp_path), LOCAL, identity())


def test_pending_shards_by_name_alone(tmp_path: Path) -> None:
    run = open_run(str(tmp_path), LOCAL, identity())
    entries = [Entry(str(i), f"/{i}") for i in range(5)]
    manifest = write_manifest(entries, LOCAL, str(tmp_path), ShardConfig(images=1))
    assert run.pending_shards(manifest) == [0, 1, 2, 3, 4]
    (tmp_path / "labels").mkdir()
    for name in ("shard-000001.parquet", "shard-000003.parquet", ".shard-000002.parquet.x.tmp", "shard-0.parquet"):
        (tmp_path / "labels" / name).write_bytes(b"")
    assert run.pending_shards(manifest) == [0, 2, 4]


def test_discard_takes_only_its_own_files(tmp_path: Path) -> None:
    run = open_run(str(tmp_path), LOCAL, identity())
    write_manifest([Entry("a", "/a")], LOCAL, str(tmp_path), ShardConfig())
    (tmp_path / "mine.txt").write_text("x")
    run.discard()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["mine.txt"]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "shard-000000.parquet").write_bytes(b"")
    with pytest.raises(RunError, match="holds labels"):
        run.discard()
