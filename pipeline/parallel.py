"""Work ahead of the consumer, in order, within a bound."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def map_ahead(
    pool: Executor,
    function: Callable[[A], B],
    items: Iterable[A],
    ahead: int,
    cost: Callable[[A], int] = lambda item: 0,
    budget: int = 0,
) -> Iterator[B]:
    """Like map, in order, with at most `ahead` results computed or waiting beyond the one consumed.

    What waits also costs at most `budget` together, or is one item: an item starts only when there is room, and
    items start in order, so that none waits for room that only a later one could give back.
    """
    futures: deque[tuple[Future[B], int]] = deque()
    held = 0
    for item in items:
        price = cost(item)
        while futures and (len(futures) > ahead or held + price > budget):
            future, freed = futures.popleft()
            held -= freed
            yield future.result()
            del future  # its result may be large
        futures.append((pool.submit(function, item), price))
        held += price
    while futures:
        yield futures.popleft()[0].result()
