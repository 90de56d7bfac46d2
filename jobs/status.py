"""`cliper status`: show the progress of a run, from any machine."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.pipeline.config import counted
from cliper.pipeline.run.folder import read_run
from cliper.pipeline.run.heartbeat import Heartbeat
from cliper.pipeline.run.status import Status, read_status
from cliper.pipeline.storage.backend import Storage

Opt = typer.Option


def status(
    run: Annotated[str, typer.Argument(help="Run folder: local path or s3:// prefix", metavar="RUN")],
    json_output: Annotated[bool, Opt("--json", help="Print JSON")] = False,
    quick: Annotated[bool, Opt("--quick", help="List names only; do not read what failed")] = False,
    storage_option: StorageOption = None,
) -> None:
    """Show the progress of RUN: images done, rate, failures, time left and lease holder.

    Reads names, times and file footers. Does not contact the driver and writes nothing.
    """
    found = read_status(read_run(run, Storage(parse_options(storage_option or []))), failures=not quick)
    print(found.to_json() if json_output else describe(found, datetime.now(UTC)))


def describe(found: Status, now: datetime) -> str:
    """The status as readable lines; `now` is a timezone-aware time."""
    lines = [
        ("run", f"{found.uri}, {found.fingerprint}, {found.state}"),
        *(_counts(found, now) if found.shards else [("images", _unlisted(found))]),
        ("driver", _driver(found)),
    ]
    if found.progress:
        lines.insert(1, ("now", _now(found.progress)))
    if found.changed:
        lines.append(("changed", f"{found.changed} shards have replaced images that wait to be labeled again"))
    if found.started:
        lines.append(("active", _started(found)))
    return "\n".join(f"{name:<10}{text}" for name, text in lines)


def _counts(found: Status, now: datetime) -> list[tuple[str, str]]:
    share = f" ({found.images_done / found.images:.1%})" if found.images else ""
    return [
        ("images", f"{found.images_done} of {found.images}{share}"),
        ("shards", f"{found.shards_done} of {found.shards}"),
        ("rate", "unknown yet" if found.rate is None else f"{found.rate:.1f} images/s over the last shards"),
        ("left", _left(found, now)),
        ("failed", _failed(found)),
    ]


def _unlisted(found: Status) -> str:
    if found.unlisted:
        return f"{counted(found.unlisted, 'labeled shard')}, but manifest/index.json is gone; restore it"
    if found.state == "listing":
        return "being listed by the driver; nothing is labeled until the list is complete"
    return "none listed yet; run the same 'cliper label' command again, which lists and labels them"


def _now(beat: Heartbeat) -> str:
    actors = f"{counted(beat.actors, 'actor')} ready"
    return (
        f"{beat.phase}: {beat.images} of {beat.total} images segmented, {beat.rate:.1f} images/s, "
        f"{beat.failed} failed, {actors} ({beat.age:.0f} s ago)"
    )


def _left(found: Status, now: datetime) -> str:
    if found.images and found.images_done == found.images:
        return "images that changed" if found.changed else "nothing"
    if found.seconds_left is None:
        return "unknown: too few shards" if found.state == "running" else "unknown: not running"
    end = now + timedelta(seconds=found.seconds_left)
    return f"about {timedelta(seconds=round(found.seconds_left))}, until {end:%Y-%m-%d %H:%M} UTC"


def _failed(found: Status) -> str:
    if found.failures is None:
        return "not read (--quick)"
    causes = ", ".join(f"{cause} {count}" for cause, count in found.failures.items())
    unread = f"; {found.unreadable} files could not be read: run cliper verify" if found.unreadable else ""
    return f"{sum(found.failures.values())}" + (f" ({causes})" if causes else "") + unread


def _driver(found: Status) -> str:
    driver = found.driver
    if driver is None:
        return "none"
    gone = " (its process is gone: the next command takes over)" if driver["lives"] is False else ""
    return f"process {driver['pid']} on {driver['host']} since {driver['since']}, seen {driver['renewed']}{gone}"


def _started(found: Status) -> str:
    again = [started for started in found.started if started.starts > 1]
    deaths = sum(started.deaths for started in again)
    unread = sum(started.starts == 0 for started in found.started)
    text = f"{counted(len(found.started), 'shard')}, {len(again)} of them restarted"
    text += f" after an image's process died {deaths} times" if deaths else ""
    return text + (f"; the notes of {unread} could not be read" if unread else "")
