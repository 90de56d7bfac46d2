"""A run folder: its identity, its content, and the shards that are left to do.

run.json                      identity: everything that decides a mask; written first
lease.json                    which command works on the run at the moment (lease.py)
manifest/                     the corpus, cut into shards (corpus/manifest.py)
labels/shard-000000.parquet   one file per finished shard (shards.py)
"""

import hashlib
import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from cliper.model.classes import ClassList
from cliper.pipeline.config import SHARED, JobConfig
from cliper.pipeline.corpus.manifest import Manifest, read_manifest
from cliper.pipeline.errors import RunError
from cliper.pipeline.run.lease import LEASE_FILE
from cliper.pipeline.run.shards import shards_in
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import absolute, join

# Settings that change how a run executes but not what it writes.
_NOT_IDENTITY = ("resources",)
# Settings of the input that runs of before did not have: part of the identity only when they are used.
_LATER_INPUT = {"include", "exclude", "any_name", "truncated", "skip_damaged"}
_NAMED = 3  # differences that a refusal spells out


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    uri: str
    storage: Storage
    identity: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the identity; in every file and row."""
        return fingerprint(self.identity)

    def done_shards(self) -> set[int]:
        """Shards with a file. Lists names only and reads no finished shard.

        A store whose listing lags behind costs work, not correctness: a shard that is missing from it is computed
        again and written with the same rows under the same name.
        """
        try:
            names = [name for name, _ in self.storage.list_files(join(self.uri, "labels"))]
        except FileNotFoundError:
            return set()
        return shards_in(names)

    def pending_shards(self, manifest: Manifest) -> list[int]:
        """Shards still to do, in order."""
        done = self.done_shards()
        return [shard for shard in range(manifest.shards) if shard not in done]

    def manifest(self) -> Manifest:
        """The run's manifest. Raises RunError if the corpus was never listed to its end."""
        manifest = read_manifest(self.storage, self.uri)
        if manifest is None:
            raise RunError(f"{self.uri} has no manifest: its corpus was never listed; run 'cliper label' again")
        return manifest

    def discard(self) -> None:
        """Remove run.json and the manifest of a run that has labeled nothing; other files are left alone."""
        if self.done_shards():
            raise RunError(f"{self.uri} holds labels; it is not discarded")
        names = [name for name, _ in self.storage.list_files(self.uri)]
        for name in names:
            if name == "run.json" or name.startswith("manifest/"):
                self.storage.remove(join(self.uri, name))


def identity_of(
    config: JobConfig, classes: ClassList, input_uri: str, weights: Mapping[str, str]
) -> dict[str, Any]:
    """Every setting that affects the output, as plain JSON values. No secrets: storage options stay out."""
    settings = config.model_dump(mode="json", exclude=set(_NOT_IDENTITY))
    new = config.input.model_dump(mode="json", include=_LATER_INPUT, exclude_defaults=True)
    settings["input"] = {key: v for key, v in settings["input"].items() if key not in _LATER_INPUT} | new
    doubled = [name for name in SHARED if name in settings["model"]]  # stands in `model`, as in version 0.1
    settings = {key: value for key, value in settings.items() if key not in doubled}
    return {
        "cliper": version("cliper"),
        "input_uri": input_uri,
        "classes": class_table(classes),
        "weights": dict(weights),
        **settings,
    }


def class_table(classes: ClassList) -> dict[str, str]:
    """Label number to class, with its prompt where that is not the name: {"1": "cat", "2": "dog = a dog"}."""
    pairs = zip(classes.names, classes.prompts, strict=True)
    lines = [name if name == prompt else f"{name} = {prompt}" for name, prompt in pairs]
    return {str(label): line for label, line in enumerate(lines, 1)}


def class_names(identity: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names of a run, in the order of their labels."""
    table = identity["classes"]
    return tuple(table[label].partition(" = ")[0] for label in sorted(table, key=int))


def fingerprint(identity: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of the identity's canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def begin_run(uri: str, storage: Storage, identity: Mapping[str, Any]) -> Run:
    """Create the run folder, or continue it if it is of the same identity. Raises as `check_folder` does."""
    if not check_folder(uri, storage, identity):
        content = {"identity": identity, "fingerprint": fingerprint(identity), "created": _now()}
        content["digest"] = _digest(content)
        storage.write_json(join(uri, "run.json"), content, indent=2)
    return Run(absolute(uri), storage, identity)


def check_folder(uri: str, storage: Storage, identity: Mapping[str, Any]) -> bool:
    """Return whether the run exists already; False where it can be created. Writes nothing.

    Raises RunError naming the first keys that differ, or if the folder holds something else.
    """
    try:
        stored = _stored_identity(uri, storage)
    except FileNotFoundError:
        _refuse_foreign_folder(uri, storage)
        return False
    different = list(differences(stored, identity))
    if different:
        more = len(different) - _NAMED
        listed = "; ".join(different[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise RunError(
            f"{uri} belongs to a run with other settings: {listed}. "
            "Continue it with its own settings, choose another output, or start beside it with --new-run"
        )
    return True


def free_folder(uri: str, storage: Storage) -> str:
    """Where a new run can go without touching anything: `uri` unless it holds a run, else URI-2, URI-3, ...

    A folder counts as free if it holds nothing at all.
    """
    if not storage.exists(join(uri, "run.json")):
        return uri
    names = (f"{uri.rstrip('/')}-{number}" for number in itertools.count(2))
    return next(name for name in names if _first_file(name, storage) is None)


def read_run(uri: str, storage: Storage) -> Run:
    """Open an existing run folder for reading. Raises RunError if it is none."""
    try:
        return Run(absolute(uri), storage, _stored_identity(uri, storage))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(f"{uri} is not a run folder: it has no run.json") from error


def _stored_identity(uri: str, storage: Storage) -> dict[str, Any]:
    """The identity in run.json. Raises RunError for a damaged file, FileNotFoundError without one."""
    file = join(uri, "run.json")
    try:
        content = json.loads(storage.read(file))
        identity: dict[str, Any] = content["identity"]
        known, digest = content.get("fingerprint", ""), content.pop("digest", None)
        class_names(identity)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is damaged, or is not a run's identity; choose another output") from error
    if (known and known != fingerprint(identity)) or (digest is not None and digest != _digest(content)):
        raise RunError(f"{file} is damaged: it is not what was written; restore it, or choose another output")
    return identity


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line per setting that differs between two identities, by its dotted key."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(set(old) | set(new))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path} was {_short(old)}, is now {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_foreign_folder(uri: str, storage: Storage) -> None:
    first = _first_file(uri, storage, ignored=(LEASE_FILE,))  # a run is just being created
    if first is not None:
        raise RunError(f"{uri} is not empty and not a run folder (it holds {first}); choose another output")


def _first_file(uri: str, storage: Storage, ignored: Collection[str] = ()) -> str | None:
    try:
        return next((name for name, _ in storage.list_files(uri) if name not in ignored), None)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
