"""The Ray cluster as a run meets it: what is free, and CPUs that are held until the run ends.

Actors hold their room as long as they live. Loading and writing tasks come and go: without a reservation, other
work could take their CPUs in between, and a run that holds GPUs would stand still.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cliper.pipeline.config import ResourceConfig
from cliper.pipeline.errors import BusyError, ResourceError
from cliper.pipeline.label.pool import (
    Node,
    Pool,
    custom_resources,
    describe_free,
    plan_pool,
)

Say = Callable[[str], None]

SETTLE_SECONDS = 20.0  # for Ray to place what should fit; longer means that other work took the room
GRACE_SECONDS = 60.0  # for a driver that has just ended, or was killed, to give back its room
SAY_EVERY = 5.0  # seconds between two lines while waiting


def cluster_nodes() -> list[Node]:
    """The living nodes of the connected cluster."""
    import ray

    # Ray has no public call for what is free on each node; this one is in every release from 2.50 to 2.60.
    free = ray._private.state.available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(n["Resources"], free.get(n["NodeID"], {}), n.get("Labels") or {}) for n in alive]


def wait_for_pool(wanted: ResourceConfig, seconds: float, say: Say) -> Pool:
    """Plan a pool on what is free, for up to `seconds`; what is missing is asked of the cluster's autoscaler.

    What other work holds gets GRACE_SECONDS in any case: actors of a driver that was killed may still be there.
    Raises ResourceError with the reason that is left.
    """
    began, said = time.monotonic(), 0.0
    try:
        while True:
            try:
                return plan_pool(wanted, cluster_nodes())
            except ResourceError as error:
                allowed = max(seconds, GRACE_SECONDS) if isinstance(error, BusyError) else seconds
                left = began + allowed - time.monotonic()
                if left <= 0:
                    raise
                if seconds:
                    _request(wanted)
                if time.monotonic() - said >= SAY_EVERY:
                    said = time.monotonic()
                    say(f"waiting for resources, {left:.0f} s more: {str(error).split('; lower')[0]}")
            time.sleep(min(1.0, max(0.0, left)))
    finally:
        if seconds:
            _request(None)


def _request(wanted: ResourceConfig | None) -> None:
    """Ask the autoscaler for the first actors of a pool that does not fit yet; None takes that back."""
    from ray.autoscaler.sdk import request_resources

    if wanted is None:
        request_resources(bundles=[])
        return
    count = 1 if wanted.actors is None else wanted.actors if isinstance(wanted.actors, int) else wanted.actors.min
    gpus = {} if wanted.device == "cpu" else {"GPU": 1 / wanted.actors_per_gpu}
    bundle = {"CPU": wanted.cpus_per_actor or 1.0, **gpus, **custom_resources(wanted)}
    whole = {name: math.ceil(amount) for name, amount in bundle.items()}  # all that Ray 2.50 takes
    request_resources(bundles=[whole] * count + [{"CPU": 1}])


@contextmanager
def reserved(bundles: Sequence[float], each: float) -> Iterator[dict[str, Any]]:
    """Hold CPUs for tasks of `each` CPUs until the block ends; yields the tasks' options for map_batches.

    `bundles` are the CPUs held together on a node; if they do not all fit, the first one alone is held. Raises
    ResourceError if even that was taken meanwhile.
    """
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = _placed(bundles) or (_placed(bundles[:1]) if len(bundles) > 1 else None)
    if group is None:
        raise ResourceError(
            f"the {bundles[0]:g} CPU for reading and writing was taken by other work: free are "
            f"{describe_free(cluster_nodes())}; run the command again with --wait-for-resources 10m"
        )
    try:
        yield {"num_cpus": each, "scheduling_strategy": PlacementGroupSchedulingStrategy(group)}
    finally:
        remove_placement_group(group)


def _placed(bundles: Sequence[float]) -> Any:
    """A placement group of these CPUs, spread over the nodes; None if Ray cannot place it in time."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{"CPU": cpus} for cpus in bundles], "SPREAD")
    if group.wait(timeout_seconds=SETTLE_SECONDS):
        return group
    remove_placement_group(group)
    return None
