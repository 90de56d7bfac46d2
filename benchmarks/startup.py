"""The start of a local run, part by part: what is printed when, and the processor time of every process.

    python -m benchmarks.startup                       # embedded model, the four example photographs
    python -m benchmarks.startup --noop --runs 3       # a segmenter that does nothing, 40 one-image shards

Each run is a `cliper label` that starts Ray. Times are seconds from the command. Processor time is counted until
the first commit, for the command and all processes below it, by the title that Ray gives them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).parent.parent
TICK = os.sysconf("SC_CLK_TCK")
EVERY = 0.2  # seconds between two looks at the processes
NAMES = (
    "gcs_server",
    "raylet/raylet",
    "monitor.py",
    "dashboard/dashboard.py",
    "dashboard/agent.py",
    "runtime_env",
    "log_monitor",
)
NOOP = """
import sys
import numpy as np
from cliper.jobs.cli import main
from cliper.model.config import Settings
from cliper.model.segmentation import Segmentation
from cliper.pipeline.label.segmenters import SEGMENTERS, SegmenterKind

class Noop:
    def __init__(self, config, classes):
        self.classes = len(classes)

    def segment(self, images, image_ids):
        return [Segmentation.of(np.zeros(image.shape[:2], np.uint8), self.classes) for image in images]

SEGMENTERS["noop"] = SegmenterKind(Settings, Noop, lambda config: {}, lambda config: "noop")
main()
"""


class Processes:
    """The processes below a command: start, and processor time so far."""

    def __init__(self, command: int) -> None:
        self.known, self.began = {command}, float(Path("/proc/uptime").read_text().split()[0])
        self.names: dict[int, str] = {}
        self.started: dict[int, float] = {}
        self.used: dict[int, float] = {}

    def look(self) -> None:
        """Read /proc once; children of known processes become known."""
        for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            except OSError:  # it has ended
                continue
            if pid in self.known or int(fields[1]) in self.known:
                self.known.add(pid)
                self.started.setdefault(pid, int(fields[19]) / TICK - self.began)
                self.used[pid] = (int(fields[11]) + int(fields[12])) / TICK
                self._name(pid, title)

    def _name(self, pid: int, title: str) -> None:
        """A worker is named by the title it had last, other than that of an idle one."""
        name = next((name for name in NAMES if name in title), title)
        if name not in ("", "ray::IDLE") or pid not in self.names:
            self.names[pid] = name

    def rows(self) -> list[str]:
        """A line per process, in order of the start."""
        order = sorted(self.used, key=lambda pid: self.started[pid])
        return [f"{self.started[pid]:7.2f} {self.used[pid]:7.2f}  {self.names[pid][:80]}" for pid in order]


def run(command: Sequence[str], labels: Path) -> None:
    """Run a command, and print its lines with their times, the first commit and the processes up to then."""
    began = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        processes = Processes(process.pid)
        assert process.stdout is not None
        reader = Thread(target=_echo, args=(process.stdout, began))
        reader.start()
        while process.poll() is None and not _committed(labels):
            processes.look()
            deadline = time.monotonic() + EVERY
            while time.monotonic() < deadline and not _committed(labels):
                time.sleep(0.02)
        first = time.monotonic() - began
        processes.look()
        reader.join()
    print(f"{first:7.2f}  first commit\n{time.monotonic() - began:7.2f}  end\n\n  start     cpu  process")
    print("\n".join(processes.rows()))
    print(f"        {sum(processes.used.values()):7.2f}  all, until the first commit\n", flush=True)


def _committed(labels: Path) -> bool:
    return labels.is_dir() and any(path.suffix == ".parquet" for path in labels.iterdir())


def _echo(lines: Iterable[str], began: float) -> None:
    for line in lines:
        print(f"{time.monotonic() - began:7.2f}  {line.rstrip()}", flush=True)


def main() -> None:
    """Read the options and run."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--noop", action="store_true", help="a segmenter that does nothing, one image per shard")
    options.add_argument("--runs", type=int, default=1)
    given = options.parse_args()
    for _ in range(given.runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            corpus, config, command = ROOT / "examples" / "photos", [], ["-m", "cliper.jobs.cli"]
            if given.noop:
                from tests.support.fakes import write_corpus

                corpus, command = folder / "corpus", ["-c", NOOP]
                write_corpus(corpus, 40)
                (folder / "noop.yaml").write_text("segmenter: noop\nshard: {images: 1}\n")
                config = ["--config", str(folder / "noop.yaml")]
            where = ["--input", str(corpus), "--output", str(folder / "run"), *config]
            classes = ["--classes", str(ROOT / "examples" / "classes.txt")]
            run([sys.executable, *command, "label", *where, *classes], folder / "run" / "labels")


if __name__ == "__main__":
    main()
