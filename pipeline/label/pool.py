"""The pool of segmenting actors: how many, how large, and whether the cluster can hold it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cliper.model.allocator import KEEP_FREED_MEMORY
from cliper.pipeline.config import ResourceConfig
from cliper.pipeline.errors import ResourceError

IO_CPUS = 0.25  # of a loading or a writing task: they wait for storage most of the time


@dataclass(frozen=True)
class Pool:
    """The segmenting actors."""

    actors: int
    cpus_per_actor: float
    gpus_per_actor: int

    @property
    def actor_options(self) -> dict[str, Any]:
        """What Ray gives an actor; one on the CPU keeps freed memory (cliper_model/allocator.py)."""
        return {
            "num_cpus": self.cpus_per_actor,
            "num_gpus": self.gpus_per_actor or None,
            "runtime_env": {} if self.gpus_per_actor else {"env_vars": KEEP_FREED_MEMORY},
        }


def plan_pool(wanted: ResourceConfig, nodes: Sequence[Mapping[str, float]]) -> Pool:
    """Size the actors from the nodes ({"CPU": 8.0, "GPU": 1.0} each): one per GPU, else one per four CPUs.

    Raises ResourceError if they cannot be scheduled beside one loading and one writing task; every actor has to
    fit on one node.
    """
    cpus, gpus = sum(node.get("CPU", 0.0) for node in nodes), sum(int(node.get("GPU", 0)) for node in nodes)
    actors = wanted.actors or gpus or max(1, int(cpus) // 4)
    if gpus and actors > gpus:
        raise ResourceError(f"{actors} actors need a GPU each, the cluster has {gpus}; lower --actors")
    spare = cpus - 2 * IO_CPUS
    if wanted.cpus_per_actor is not None:
        choices = [wanted.cpus_per_actor]
    else:  # as many whole CPUs as fit, but one beside a GPU
        choices = [1.0] if gpus else [float(n) for n in range(max(1, int(spare / actors)), 0, -1)]
    for per_actor in choices:
        if actors * per_actor <= spare and places(nodes, per_actor, 1 if gpus else 0) >= actors:
            return Pool(actors, per_actor, 1 if gpus else 0)
    raise ResourceError(
        f"{actors} actors with {choices[-1]:g} CPUs each and {2 * IO_CPUS:g} for reading and writing do not fit "
        f"{_describe(nodes)}; lower --actors or --cpus-per-actor, or add nodes"
    )


def places(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: int) -> int:
    """How many actors fit, each on one node."""
    by_cpu = [int(node.get("CPU", 0.0) / cpus + 1e-9) for node in nodes]
    by_gpu = [
        int(node.get("GPU", 0.0)) // gpus if gpus else count for node, count in zip(nodes, by_cpu, strict=True)
    ]
    return sum(map(min, by_cpu, by_gpu))


def _describe(nodes: Sequence[Mapping[str, float]]) -> str:
    cpus = [node.get("CPU", 0.0) for node in nodes]
    if len(cpus) == 1:
        return f"{cpus[0]:g} CPUs"
    return f"{len(cpus)} nodes with {', '.join(f'{count:g}' for count in cpus[:8])}{' ...' * (len(cpus) > 8)} CPUs"
