"""A segmenter that records its placement by Ray: node, GPUs, CPUs."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cliper.model.classes import ClassList
from cliper.pipeline.config import JobConfig
from tests.support.fakes import Brightness


@dataclass(frozen=True)
class Placed:
    """Makes Brightness segmenters; each writes a file to `folder`.

    With `together`, each waits until there are that many: a pool that is busy drops actors that have not started.
    An image takes `seconds` until there are `hurries` actors, and nothing after that.
    """

    folder: str
    together: int = 1
    seconds: float = 0.0
    hurries: int = 1

    def __call__(self, config: JobConfig, classes: ClassList) -> Brightness:
        import ray

        context = ray.get_runtime_context()
        note = {
            "node": context.get_node_id(),
            "gpus": context.get_accelerator_ids().get("GPU", []),
            "resources": context.get_assigned_resources(),
            "device": config.resources.device,
        }
        Path(self.folder).mkdir(exist_ok=True, parents=True)
        file = Path(self.folder) / f"{os.getpid()}.json"
        file.with_suffix(".tmp").write_text(json.dumps(note))
        file.with_suffix(".tmp").rename(file)
        deadline = time.monotonic() + 120
        while len(self.notes) < self.together:
            assert time.monotonic() < deadline, f"{len(self.notes)} of {self.together} actors have started"
            time.sleep(0.1)
        return _Slow(config, classes, self)

    @property
    def notes(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in Path(self.folder).glob("*.json")]


class _Slow(Brightness):
    def __init__(self, config: JobConfig, classes: ClassList, placed: Placed) -> None:
        super().__init__(config, classes)
        self.placed = placed

    def segment(self, images: Any, image_ids: Any) -> Any:
        if len(self.placed.notes) < self.placed.hurries:
            time.sleep(self.placed.seconds * len(images))
        return super().segment(images, image_ids)


@contextmanager
def logical_cluster(*nodes: dict[str, Any]) -> Iterator[Any]:
    """A real Ray of several nodes on this machine; the first is the head. RAY_ADDRESS points to it meanwhile."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # that of the files before
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small | nodes[0])
    for node in nodes[1:]:
        cluster.add_node(**({"object_store_memory": 80_000_000} | node))
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield cluster
    finally:
        os.environ.pop("RAY_ADDRESS")
        if before is not None:
            os.environ["RAY_ADDRESS"] = before
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
