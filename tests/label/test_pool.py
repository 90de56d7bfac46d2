"""The pool is sized to free resources; a pool that does not fit is refused with the reason and the remedy."""

from typing import Any

import pytest

from cliper.pipeline.config import JobConfig, ResourceConfig
from cliper.pipeline.errors import ResourceError
from cliper.pipeline.label.pool import Node, describe_pool, plan_pool, wants_gpu


def resources(**wanted: Any) -> ResourceConfig:
    return JobConfig.model_validate({"resources": wanted}).resources


def idle(*nodes: dict[str, float]) -> list[Node]:
    return [Node.idle(**node) for node in nodes]


def busy(total: float, used: float, **more: float) -> Node:
    return Node({"CPU": total, **more}, {"CPU": total - used, **more})


@pytest.mark.parametrize(
    ("wanted", "nodes", "expected"),
    [
        ({}, idle({"CPU": 2}), (1, 1, 0)),
        ({}, idle({"CPU": 1}), (1, 0.5, 0)),
        ({}, idle({"CPU": 16}), (4, 3, 0)),
        ({}, idle({"CPU": 64, "GPU": 8}), (8, 1, 1)),
        ({}, idle(*[{"CPU": 2}] * 3), (1, 2, 0)),  # no node has the five that are left
        ({}, idle(*[{"CPU": 5}] * 4), (5, 2, 0)),
        ({"actors_per_gpu": 4}, idle({"CPU": 8, "GPU": 1}), (4, 1, 0.25)),
        ({"actors_per_gpu": 3, "actors": 2}, idle({"CPU": 8, "GPU": 1}), (2, 1, 0.3333)),
        ({"device": "cpu"}, idle({"CPU": 4, "GPU": 2}), (1, 3, 0)),
        ({}, [Node({"CPU": 0}, {"CPU": 0}), *idle({"CPU": 8, "GPU": 2})], (2, 1, 1)),  # a head without CPUs
    ],
)
def test_size(wanted: dict[str, Any], nodes: list[Node], expected: tuple[int, float, float]) -> None:
    pool = plan_pool(resources(**wanted), nodes)
    assert (pool.actors, pool.cpus_per_actor, pool.gpus_per_actor) == expected


def test_the_pool_uses_free_resources_only() -> None:
    assert plan_pool(resources(), [busy(4, 1)]).cpus_per_actor == 2
    assert (
        plan_pool(resources(), [busy(8, 0, GPU=2), Node({"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 0})]).actors == 2
    )
    with pytest.raises(ResourceError, match=r"fit this cluster, but other work .* free: 3 CPUs; lower .*10m"):
        plan_pool(resources(actors=1, cpus_per_actor=3), [busy(4, 1)])


def test_reading_and_writing_keep_a_share_that_grows_with_the_actors() -> None:
    assert plan_pool(resources(actors=1, cpus_per_actor=3), idle({"CPU": 4})).io_bundles == 1
    assert plan_pool(resources(), idle({"CPU": 64, "GPU": 8})).io_bundles == 8
    assert plan_pool(resources(actors={"min": 1, "max": 64}), idle({"CPU": 9, "GPU": 1})).io_bundles == 16
    assert plan_pool(resources(actors=1, cpus_per_actor=3), idle({"CPU": 4})).io_tasks == 1


def test_elastic_pools_start_with_the_minimum() -> None:
    pool = plan_pool(resources(actors={"min": 2, "max": 64}), idle({"CPU": 8, "GPU": 2}))
    assert (pool.actors, pool.max_actors, pool.elastic) == (2, 64, True)
    assert not plan_pool(resources(actors={"min": 2, "max": 2}), idle({"CPU": 8})).elastic


def test_actors_go_only_where_placement_says() -> None:
    a100 = Node.idle(**{"CPU": 16.0, "GPU": 4.0, "accelerator_type:A100": 1.0})
    t4 = Node.idle(**{"CPU": 16.0, "GPU": 1.0, "accelerator_type:T4": 1.0, "spot": 4.0})
    zone = Node({"CPU": 8.0}, {"CPU": 8.0}, {"zone": "b"})
    nodes = [a100, t4, zone]
    pool = plan_pool(resources(accelerator_type="A100"), nodes)
    assert (pool.actors, pool.bundle) == (4, {"CPU": 1.0, "GPU": 1.0, "accelerator_type:A100": 0.001})
    assert plan_pool(resources(custom={"spot": 1}), nodes).actors == 1
    assert plan_pool(resources(labels={"zone": "b"}), nodes).bundle == {"CPU": 3.0}
    with pytest.raises(ResourceError, match="no node has accelerator type 'H100'; the nodes have A100, T4, spot"):
        plan_pool(resources(accelerator_type="H100"), nodes)
    with pytest.raises(ResourceError, match="no node has label zone=c; .*zone=b"):
        plan_pool(resources(labels={"zone": "c"}), nodes)


@pytest.mark.parametrize(
    ("wanted", "nodes", "message"),
    [
        (
            {"actors": 9},
            idle({"CPU": 4}),
            "9 actors with 0.5 CPU each, and 0.5 CPU for .* do not fit 4 CPUs; lower",
        ),
        ({"actors": 3}, idle({"CPU": 16, "GPU": 2}), "3 actors with 0.5 CPU, 1 GPU each"),
        ({"cpus_per_actor": 9}, idle({"CPU": 8, "GPU": 1}), "lower --actors or --cpus-per-actor, or add nodes"),
        ({"cpus_per_actor": 6}, idle({"CPU": 4}, {"CPU": 4}), "do not fit 2 nodes with 4 CPUs; 4 CPUs"),
        ({"device": "cuda"}, idle({"CPU": 4}), "no node has a GPU; the nodes have 4 CPUs; use --device cpu"),
        ({}, idle({"CPU": 0}), "the cluster has no CPUs and no GPUs yet; .*--device cuda or --device cpu"),
    ],
)
def test_pools_that_cannot_be_scheduled_are_refused(
    wanted: dict[str, Any], nodes: list[Node], message: str
) -> None:
    with pytest.raises(ResourceError, match=message):
        plan_pool(resources(**wanted), nodes)


def test_a_named_device_needs_no_nodes() -> None:
    assert wants_gpu(resources(device="cuda"), [])
    assert not wants_gpu(resources(device="cpu"), [])
    assert wants_gpu(resources(), idle({"CPU": 1, "GPU": 1}))


def test_the_printed_pool() -> None:
    nodes = [*idle({"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}), *idle({"CPU": 4})]
    pool = plan_pool(resources(cpus_per_actor=4), nodes)
    expected = "2 actors, each 1 GPU and 4 CPUs, on 2 of 3 nodes; 12 CPUs left for reading and writing"
    assert describe_pool(pool, nodes) == expected
