"""The free resources of the Ray cluster, and a reservation of CPUs that lasts until the run ends.

Actors hold their resources as long as they live. Loading and writing tasks come and go: without a reservation,
other work could take their CPUs in between, and a run that holds GPUs would stall.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

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
T = TypeVar("T")

SETTLE_SECONDS = 20.0  # for Ray to place a group that should fit; longer means that other work took the CPUs
GRACE_SECONDS = 60.0  # for a driver that has just ended, or was killed, to release its resources
RELEASE_SECONDS = 5.0  # for Ray to release the CPUs of tasks that have ended
SAY_EVERY = 5.0  # seconds between two lines while waiting


def cluster_nodes() -> list[Node]:
    """The nodes of the connected cluster that are alive."""
    import ray

    # Ray has no public call for the free resources of each node; this one exists in every release from 2.50 to
    # 2.60.
    free = ray._private.state.available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(n["Resources"], free.get(n["NodeID"], {}), n.get("Labels") or {}) for n in alive]


def wait_for_pool(wanted: ResourceConfig, seconds: float, say: Say) -> Pool:
    """Plan a pool on free resources, waiting up to `seconds` and requesting the missing ones from the autoscaler.

    If other work uses the resources, it always waits GRACE_SECONDS: actors of a killed driver may not have stopped
    yet. Raises ResourceError with the last reason.
    """
    return _until(lambda: plan_pool(wanted, cluster_nodes()), _first_actors(wanted), seconds, say)


def wait_for_cpu(seconds: float, say: Say) -> float:
    """Wait until a CPU of the cluster is free, and request one from the autoscaler; tasks would queue silently.

    Returns the number of free CPUs. Raises ResourceError after `seconds`.
    """
    return _until(_free_cpus, [{"CPU": 1}], seconds, say)


def wait_for_release(free: float) -> None:
    """Wait until as many CPUs are free as there were before tasks of this command: Ray holds theirs for a moment.

    RELEASE_SECONDS at most, because other work may have taken them.
    """
    end = time.monotonic() + RELEASE_SECONDS
    while _sum_of_free(cluster_nodes()) < free and time.monotonic() < end:
        time.sleep(0.1)


def _until(ready: Callable[[], T], missing: list[dict[str, int]], seconds: float, say: Say) -> T:
    """The result of `ready`, tried again while it raises ResourceError; `missing` is requested meanwhile."""
    from ray.autoscaler.sdk import request_resources

    began, said = time.monotonic(), -math.inf
    try:
        while True:
            try:
                return ready()
            except ResourceError as error:
                allowed = max(seconds, GRACE_SECONDS) if isinstance(error, BusyError) else seconds
                left = began + allowed - time.monotonic()
                if left <= 0:
                    raise
                if time.monotonic() - said >= SAY_EVERY:
                    said = time.monotonic()
                    say(f"waiting for resources, {left:.0f} s more: {str(error).split('; lower')[0]}")
                    if seconds:
                        request_resources(bundles=missing)
            time.sleep(min(1.0, left))
    finally:
        if seconds and said > -math.inf:
            request_resources(bundles=[])


def _first_actors(wanted: ResourceConfig) -> list[dict[str, int]]:
    """The bundles that a pool's first actors and its loading need, in whole numbers: all that Ray 2.50 takes."""
    count = 1 if wanted.actors is None else wanted.actors if isinstance(wanted.actors, int) else wanted.actors.min
    gpus = {} if wanted.device == "cpu" else {"GPU": 1 / wanted.actors_per_gpu}
    bundle = {"CPU": wanted.cpus_per_actor or 1.0, **gpus, **custom_resources(wanted)}
    return [{name: math.ceil(amount) for name, amount in bundle.items()}] * count + [{"CPU": 1}]


def _free_cpus() -> float:
    """The free CPUs of the cluster. Raises ResourceError unless a node has a whole one."""
    nodes = cluster_nodes()
    if not any(node.free.get("CPU", 0.0) >= 1 for node in nodes):
        raise ResourceError(
            f"no CPU of the cluster is free; free: {describe_free(nodes)}; wait for its other jobs, or unset "
            "RAY_ADDRESS to use this machine"
        )
    return _sum_of_free(nodes)


def _sum_of_free(nodes: Sequence[Node]) -> float:
    return sum(node.free.get("CPU", 0.0) for node in nodes)


@contextmanager
def reserved(bundles: Sequence[float], each: float) -> Iterator[dict[str, Any]]:
    """Reserve CPUs for tasks of `each` CPUs until the block ends; yields the tasks' options for map_batches.

    Each of `bundles` is a number of CPUs on one node; if they do not all fit, only the first one is reserved.
    Raises ResourceError if other work has taken even that.
    """
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = _placed(bundles) or (_placed(bundles[:1]) if len(bundles) > 1 else None)
    if group is None:
        raise ResourceError(
            f"the {bundles[0]:g} CPU for reading and writing was taken by other work; free: "
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
