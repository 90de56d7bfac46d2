"""The pool of segmenting actors: how many, how large, and whether the cluster can hold it. Arithmetic, no Ray.

A run holds its resources until it ends: one share for the actors, one for the loading and writing tasks. A run
that has started can therefore always load and write, whatever else runs on the cluster (cluster.py reserves the
CPUs).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cliper.model.allocator import KEEP_FREED_MEMORY
from cliper.pipeline.config import ResourceConfig, counted
from cliper.pipeline.errors import BusyError, ResourceError

IO_CPUS = 0.25  # of a loading or a writing task: they wait for storage most of the time
IO_BUNDLE = 2 * IO_CPUS  # the minimum reservation, on one node: one loading and one writing task

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Node:
    """A node of the cluster: its resources, those not in use, and its labels. E.g. {"CPU": 8.0, "GPU": 1.0}."""

    total: Resources
    free: Resources
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def idle(cls, **resources: float) -> "Node":
        """A node whose resources are all free."""
        return cls(resources, resources)


@dataclass(frozen=True)
class Pool:
    """The segmenting actors: `actors` of them, or up to `max_actors` as resources become free.

    `gpus_per_actor` may be a fraction. `io_bundles` are reserved for loading and writing, IO_BUNDLE CPUs each.
    `resources` and `labels` are required of the nodes that actors run on.
    """

    actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    max_actors: int = 0  # 0: as many as `actors`
    io_bundles: int = 1
    resources: Resources = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    keeps_memory: bool = False  # Ray's processes have the variables of cliper_model/allocator.py already

    @property
    def elastic(self) -> bool:
        """Whether the number of actors scales with the cluster."""
        return self.max_actors > self.actors

    @property
    def io_tasks(self) -> int:
        """The number of concurrent loading tasks, and of writing tasks; together they fit the reserved bundles."""
        return max(1, round(self.io_bundles * IO_BUNDLE / IO_CPUS) // 2)

    @property
    def bundle(self) -> dict[str, float]:
        """The resources of one actor."""
        gpus = {"GPU": self.gpus_per_actor} if self.gpus_per_actor else {}
        return {"CPU": self.cpus_per_actor, **gpus, **self.resources}

    @property
    def actor_options(self) -> dict[str, Any]:
        """The actor's options for Ray; one on the CPU keeps freed memory (cliper_model/allocator.py)."""
        inherited = self.gpus_per_actor or self.keeps_memory
        options = {
            "num_cpus": self.cpus_per_actor,
            "num_gpus": self.gpus_per_actor,
            "resources": dict(self.resources),
            "label_selector": dict(self.labels),
            "runtime_env": {} if inherited else {"env_vars": KEEP_FREED_MEMORY},
        }
        return {name: value for name, value in options.items() if value}


def wants_gpu(wanted: ResourceConfig, nodes: Sequence[Node]) -> bool:
    """Whether actors use GPUs: as set by `wanted.device`, else if the eligible nodes have any.

    Raises ResourceError if the cluster has no nodes yet to decide by, or if GPUs are requested and there are none.
    """
    if wanted.device == "cpu":
        return False
    chosen = eligible(wanted, nodes)
    has_gpu = any(node.total.get("GPU", 0) > 0 for node in chosen)
    if wanted.device == "auto" and not any(node.total.get("CPU", 0) or node.total.get("GPU", 0) for node in nodes):
        raise ResourceError(
            "the cluster has no CPUs and no GPUs yet; to start nodes for this run, add "
            "--device cuda or --device cpu, --actors, and --wait-for-resources 10m"
        )
    return has_gpu or wanted.device == "cuda"


def eligible(wanted: ResourceConfig, nodes: Sequence[Node]) -> list[Node]:
    """The nodes that actors may run on: those with the requested accelerator type, custom resources and labels."""
    needs = custom_resources(wanted)
    return [
        node
        for node in nodes
        if all(node.total.get(name, 0) >= amount for name, amount in needs.items())
        and all(node.labels.get(key) == value for key, value in wanted.labels.items())
    ]


def custom_resources(wanted: ResourceConfig) -> dict[str, float]:
    """An actor's resources other than CPUs and GPUs. Ray marks a node's accelerator as a resource of that name."""
    marked = {} if wanted.accelerator_type is None else {f"accelerator_type:{wanted.accelerator_type}": 0.001}
    return {**marked, **wanted.custom}


def plan_pool(wanted: ResourceConfig, nodes: Sequence[Node]) -> Pool:
    """Size the pool to the free resources of `nodes`: `actors_per_gpu` per free GPU, else an actor per four CPUs.

    Every actor fits on one node, and so do loading and writing. Raises ResourceError otherwise.
    """
    gpu = wants_gpu(wanted, nodes)
    chosen = eligible(wanted, nodes)
    gpus = round(1 / wanted.actors_per_gpu, 4) if gpu else 0.0
    least, most = _range(wanted, chosen, gpu)
    for cpus in _cpu_choices(wanted, nodes, gpu, least):
        pool = Pool(least, cpus, gpus, most, 1, custom_resources(wanted), wanted.labels)
        if fits(pool, nodes):
            return Pool(least, cpus, gpus, most, _io_bundles(pool, nodes), pool.resources, pool.labels)
    raise _refusal(pool, wanted, nodes)


def fits(pool: Pool, nodes: Sequence[Node]) -> bool:
    """Whether the pool's first actors and one bundle for loading and writing fit the free resources."""
    room = [places(node.free, pool.bundle) if _suits(pool, node) else 0 for node in nodes]
    for node, count in zip(nodes, room, strict=True):
        if node.free.get("CPU", 0.0) < IO_BUNDLE:
            continue
        less = {**node.free, "CPU": node.free["CPU"] - IO_BUNDLE}
        beside = places(less, pool.bundle) if count else 0
        if sum(room) - count + beside >= pool.actors:
            return True
    return False


def places(free: Resources, bundle: Resources) -> int:
    """The number of times that `bundle` fits in `free`."""
    return min(int(free.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.items())


def describe_pool(pool: Pool, nodes: Sequence[Node]) -> str:
    """E.g. "2 actors, each 1 GPU and 4 CPUs, on 2 of 3 nodes; 3 CPUs left for reading and writing"."""
    each = counted(pool.cpus_per_actor, "CPU")
    if pool.gpus_per_actor:
        each = f"{pool.gpus_per_actor:g} GPU and {each}"
    used = sum(places(node.free, pool.bundle) > 0 for node in nodes if _suits(pool, node))
    count = f"{pool.actors} to {pool.max_actors} actors" if pool.elastic else counted(pool.actors, "actor")
    left = sum(node.free.get("CPU", 0.0) for node in nodes) - pool.actors * pool.cpus_per_actor
    return (
        f"{count}, each {each}, on {min(used, pool.actors)} of {counted(len(nodes), 'node')}; "
        f"{counted(left, 'CPU')} left for reading and writing"
    )


def _range(wanted: ResourceConfig, chosen: Sequence[Node], gpu: bool) -> tuple[int, int]:
    """The minimum and maximum number of actors."""
    if wanted.actors is None:
        free = sum(int(node.free.get("GPU", 0)) for node in chosen) * wanted.actors_per_gpu
        cpus = sum(node.free.get("CPU", 0.0) for node in chosen)
        actors = max(1, free if gpu else int(cpus) // 4)
        return actors, actors
    if isinstance(wanted.actors, int):
        return wanted.actors, wanted.actors
    return wanted.actors.min, wanted.actors.max


def _cpu_choices(wanted: ResourceConfig, nodes: Sequence[Node], gpu: bool, actors: int) -> list[float]:
    """CPUs per actor to try, the best first: 1 for an actor on a GPU, else as many whole CPUs as fit."""
    if wanted.cpus_per_actor is not None:
        return [wanted.cpus_per_actor]
    if gpu:
        return [1.0, 0.5]
    spare = sum(node.free.get("CPU", 0.0) for node in eligible(wanted, nodes)) - IO_BUNDLE
    return [*(float(n) for n in range(max(1, int(spare / actors)), 0, -1)), 0.5]


def _io_bundles(pool: Pool, nodes: Sequence[Node]) -> int:
    """Bundles for loading and writing: one per possible actor, limited by the CPUs that the first actors leave."""
    left, bundles = pool.actors, 0
    for node in nodes:
        here = min(left, places(node.free, pool.bundle)) if _suits(pool, node) else 0
        left -= here
        bundles += int((node.free.get("CPU", 0.0) - here * pool.cpus_per_actor) / IO_BUNDLE + 1e-6)
    return max(1, min(bundles, max(pool.actors, pool.max_actors)))


def _suits(pool: Pool, node: Node) -> bool:
    return all(node.labels.get(key) == value for key, value in pool.labels.items())


def _refusal(pool: Pool, wanted: ResourceConfig, nodes: Sequence[Node]) -> ResourceError:
    """The error for a pool that does not fit, with a remedy."""
    each = ", ".join(f"{amount:g} {name}" for name, amount in pool.bundle.items() if ":" not in name)
    needs = f"{counted(pool.actors, 'actor')} with {each} each, and {IO_BUNDLE:g} CPU for reading and writing"
    if fits(pool, [Node(node.total, node.total, node.labels) for node in nodes]):
        return BusyError(
            f"{needs} fit this cluster, but other work is running on it; free: {describe_free(nodes)}; "
            "lower --actors or --cpus-per-actor, or wait with --wait-for-resources 10m"
        )
    if (wanted.accelerator_type or wanted.custom or wanted.labels) and not eligible(wanted, nodes):
        return ResourceError(f"no node has {_describe_needs(wanted)}; the nodes have {_describe_marks(nodes)}")
    if pool.gpus_per_actor and not any(node.total.get("GPU", 0) for node in nodes):
        have = describe_nodes(nodes)
        return ResourceError(f"no node has a GPU; the nodes have {have}; use --device cpu, or add GPU nodes")
    return ResourceError(
        f"{needs} do not fit {describe_nodes(nodes)}; lower --actors or --cpus-per-actor, or add nodes "
        "(--wait-for-resources 10m waits for them)"
    )


def describe_nodes(nodes: Sequence[Node]) -> str:
    """E.g. "2 nodes with 8 CPUs, 1 GPU; 4 CPUs"."""
    return _listed(nodes, [node.total for node in nodes])


def describe_free(nodes: Sequence[Node]) -> str:
    """Like describe_nodes, for the free resources."""
    return _listed(nodes, [node.free for node in nodes])


def _listed(nodes: Sequence[Node], amounts: Sequence[Resources]) -> str:
    texts = []
    for resources in amounts[:8]:
        gpus = resources.get("GPU", 0)
        texts.append(f"{resources.get('CPU', 0.0):g} CPUs" + (f", {counted(gpus, 'GPU')}" if gpus else ""))
    more = f"; and {len(nodes) - 8} more" if len(nodes) > 8 else ""
    return (f"{len(nodes)} nodes with " if len(nodes) > 1 else "") + "; ".join(texts) + more


def _describe_needs(wanted: ResourceConfig) -> str:
    accelerator = [] if wanted.accelerator_type is None else [f"accelerator type '{wanted.accelerator_type}'"]
    custom = [f"{amount:g} of resource '{name}'" for name, amount in wanted.custom.items()]
    return " and ".join([*accelerator, *custom, *(f"label {key}={value}" for key, value in wanted.labels.items())])


def _describe_marks(nodes: Sequence[Node]) -> str:
    """The accelerator types, custom resources and labels of the nodes."""
    own = ("CPU", "GPU", "memory", "object_store_memory")
    names = {name for node in nodes for name in node.total if name not in own and not name.startswith("node:")}
    labels = {f"{k}={v}" for node in nodes for k, v in node.labels.items() if not k.startswith("ray.io/node-id")}
    return ", ".join(sorted(name.removeprefix("accelerator_type:") for name in names) + sorted(labels)) or "none"
