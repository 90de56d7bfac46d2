"""Progress of the actors between commits: they write it to the cluster's key-value store, and the driver reads it.

An actor has one key and overwrites it at most twice a second, which keeps the load on the head low. The notes are
only displayed: no decision depends on them, and losing them is harmless.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

EVERY = 0.5  # seconds between two notes of one actor
_SPACE = b"cliper"  # namespace of the keys
_SHARDS = 3  # of one actor: one being labeled, one being written by another task


class Beat:
    """Writes one actor's progress. Does nothing outside Ray."""

    def __init__(self, board: str) -> None:
        """`board` is the prefix of the run's keys; every actor adds a separate key."""
        self.key = f"{board}/{uuid4().hex}".encode()
        self.content: dict[str, Any] = {"model_seconds": None, "device": None, "shards": {}}
        self.noted = 0.0

    def loaded(self, seconds: float, device: str) -> None:
        """Note that the model was loaded in `seconds`, on `device` (e.g. "cpu")."""
        self.content |= {"model_seconds": seconds, "device": device}
        self._note(True)

    def images(self, shard: int, done: int, failed: int) -> None:
        """Note that `done` images of a shard are segmented, of which `failed` have no mask."""
        shards: dict[str, list[float]] = self.content["shards"]
        first = not shards
        shards.pop(str(shard), None)
        shards[str(shard)] = [done, failed, time.time()]
        for old in list(shards)[:-_SHARDS]:
            del shards[old]
        self._note(first)

    def _note(self, at_once: bool) -> None:
        import ray

        now = time.monotonic()
        if ray.is_initialized() and (at_once or now - self.noted >= EVERY):
            self.noted = now
            _store("put", self.key, json.dumps(self.content).encode())


@dataclass(frozen=True)
class Seen:
    """The actors' notes: loaded models, and the images done of each shard in progress."""

    model_seconds: tuple[float, ...]  # of each actor that is ready
    devices: tuple[str, ...]  # of the same actors
    shards: Mapping[int, tuple[int, int]]  # shard: images done, of which failed


def read_board(board: str) -> Seen:
    """Read the notes below `board`; empty if the store does not answer."""
    notes = []
    for key in _store("list", f"{board}/".encode()) or []:
        content = _store("get", key)
        with suppress(ValueError):
            notes += [json.loads(content)] if content else []
    ready = [note for note in notes if note["model_seconds"] is not None]
    latest: dict[int, tuple[float, int, int]] = {}  # a shard may have died under one actor and gone on in another
    for note in notes:
        for shard, (done, failed, when) in note["shards"].items():
            if int(shard) not in latest or latest[int(shard)][0] < when:
                latest[int(shard)] = (when, done, failed)
    shards = {shard: (done, failed) for shard, (_, done, failed) in latest.items()}
    return Seen(tuple(n["model_seconds"] for n in ready), tuple(n["device"] for n in ready), shards)


def clear_board(board: str) -> None:
    """Remove a run's notes."""
    for key in _store("list", f"{board}/".encode()) or []:
        _store("delete", key)


def _store(call: str, key: bytes, value: bytes = b"") -> Any:
    """One call of Ray's key-value store; None if it fails, because notes may be lost."""
    from ray.experimental import internal_kv as kv

    try:
        if call == "put":
            return kv._internal_kv_put(key, value, overwrite=True, namespace=_SPACE)
        if call == "list":
            return kv._internal_kv_list(key, namespace=_SPACE)
        if call == "get":
            return kv._internal_kv_get(key, namespace=_SPACE)
        return kv._internal_kv_del(key, namespace=_SPACE)
    except Exception:  # a head that restarts, a driver that is being stopped
        return None
