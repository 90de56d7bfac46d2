"""`make faults`: every fault at every storage; prints a table and writes build/faults.json."""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.faults.place import Place, local_place, s3_place
from tests.faults.scenarios import ONLY_AT, SCENARIOS, Setting

STORAGES = ("local", "s3")
OWN_RAY = {"machine killed, embedded model", "node lost and added"}  # the fault takes Ray with it
FULL = {  # (images, number of faults); 2,000 and 1 unless listed here
    "driver killed": (2000, 25),
    "machine killed, embedded model": (600, 8),
    "actor or writer killed": (4000, 33),
    "node lost and added": (2000, 4),
    "poison images": (2000, 12),
    "corpus grows, driver killed": (400, 10),
}
QUICK = {
    "driver killed": (200, 3),
    "machine killed, embedded model": (100, 2),
    "actor or writer killed": (1000, 4),
    "node lost and added": (300, 1),
    "poison images": (200, 3),
    "corpus grows, driver killed": (100, 2),
}


def main() -> None:
    """Run the requested scenarios; exit code 1 if any lost, doubled or changed a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images and few faults: minutes, not an hour")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), help="this scenario; repeat for more")
    parser.add_argument("--storage", action="append", choices=STORAGES, help="default: both")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="of every random choice")
    parser.add_argument("--target", type=Path, default=ROOT / "build" / "faults.json", help="the results as JSON")
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    wanted = [(fault, storage) for fault in given.only or SCENARIOS for storage in given.storage or STORAGES]
    with shared_ray() as address:
        for fault, storage in wanted:
            if ONLY_AT.get(fault, storage) == storage:
                results.append(run(fault, storage, given.quick, given.seed, address))
                given.target.parent.mkdir(exist_ok=True, parents=True)
                given.target.write_text(json.dumps({"seed": given.seed, "results": results}, indent=1))
    print(table(results))
    sys.exit(0 if all(result["clean"] for result in results) else 1)


def run(fault: str, storage: str, quick: bool, seed: int, address: str) -> dict[str, Any]:
    """Run one scenario in a separate folder. Drivers share the Ray at `address`, see OWN_RAY."""
    images, times = QUICK.get(fault, (200, 1)) if quick else FULL.get(fault, (2000, 1))
    started = time.monotonic()
    result: dict[str, Any] = {"fault": fault, "storage": storage, "images": images}
    print(f"{fault} ({storage}) ...", file=sys.stderr, flush=True)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    with ExitStack() as stack:
        place = _place(storage, folder, stack)
        ray = None if fault in OWN_RAY else address
        try:
            outcome = SCENARIOS[fault](Setting(place, images, times, seed, ray, os.getpid() if ray else None))
        except Exception as error:  # the other scenarios still run, and this one is not clean
            traceback.print_exc()
            print(f"kept: {folder}", file=sys.stderr)
            return result | {"clean": False, "detail": {"error": str(error)[-2000:]}}
    found = outcome.count
    seconds = round(time.monotonic() - started, 1)
    print(f"  {seconds} s, {outcome.detail}", file=sys.stderr, flush=True)
    return result | {
        "images": found.images,
        "lost": len(found.lost),
        "doubled": len(found.doubled),
        "wrong": len(found.wrong),
        "problems": len(found.problems),
        "clean": found.clean,
        "seconds": seconds,
        "examples": [*found.lost[:3], *found.doubled[:3], *found.wrong[:3], *found.problems[:3]],
        "detail": outcome.detail | {"orphans_removed": found.orphans},
    }


def _place(storage: str, folder: Path, stack: ExitStack) -> Place:
    return local_place(folder / "disk") if storage == "local" else stack.enter_context(s3_place(folder / "s3"))


@contextmanager
def shared_ray() -> Iterator[str]:
    """A Ray that outlives its drivers, as a cluster does."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


COLUMNS = ("fault", "storage", "images", "lost", "doubled", "wrong", "problems", "seconds")


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown; lists of a scenario's detail are in the JSON file only."""
    lines = [f"| {' | '.join(COLUMNS)} | detail |", "|---|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"]
    for result in results:
        detail = {key: value for key, value in result["detail"].items() if not isinstance(value, list)}
        words = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in detail.items())
        lines.append(f"| {' | '.join(str(result.get(key, '?')) for key in COLUMNS)} | {words} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
