"""`--workers`: processes of this machine, or the tasks of a Ray cluster, for the commands that read a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from cliper.jobs.session import RaySession, ray_session
from cliper.model.errors import ConfigError
from cliper.pipeline.parallel import Workers, cpus

WorkersOption = Annotated[
    str | None,
    typer.Option(
        "--workers",
        help="Processes here, or ray; default: ray if RAY_ADDRESS is set, else one per CPU",
        metavar="N|ray",
    ),
]


def parse_workers(text: str | None) -> Workers:
    """A number of processes, or "ray". Raises ConfigError."""
    if text is None:
        return "ray" if os.environ.get("RAY_ADDRESS") else cpus()
    if text == "ray":
        return "ray"
    if not text.isdecimal() or not 0 < int(text) < 10_000:
        raise ConfigError(f"--workers '{text}': expected a number of processes of at least 1, or ray")
    return int(text)


@contextmanager
def started(text: str | None) -> Iterator[Workers]:
    """The workers of a command; connected to Ray (RAY_ADDRESS, or a local one) if they are its tasks."""
    workers = parse_workers(text)
    if workers != "ray":
        yield workers
        return
    with ray_session(verbose=False) as session:
        yield connected(text, session)


def connected(text: str | None, session: RaySession) -> Workers:
    """The workers of a command that has a session already."""
    workers = parse_workers(text)
    if workers == "ray":
        session.use_tasks()
    return workers


def listers(session: RaySession) -> Workers:
    """Who lists the corpus of a new run: the tasks of the cluster at RAY_ADDRESS, or this process."""
    return connected("ray", session) if os.environ.get("RAY_ADDRESS") else 1
