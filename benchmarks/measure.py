"""Measure time and peak memory of stages, and describe the machine."""

import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


class Stopwatch:
    """Collects seconds and peak memory of named stages; on CUDA those of the device."""

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = device == "cuda"
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu_seconds: dict[str, list[float]] = defaultdict(
            list
        )  # of all threads: unaffected by other processes
        self.bytes: dict[str, list[int]] = defaultdict(list)

    @contextmanager
    def stage(self, name: str, images: int = 1) -> Iterator[None]:
        """Measure a block: seconds per image, and the peak memory above that at its start."""
        before = self._begin()
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self._synchronise()
        self.seconds[name].append((time.perf_counter() - start) / images)
        self.cpu_seconds[name].append((time.process_time() - cpu) / images)
        self.bytes[name].append(self._peak() - before)

    def result(self) -> dict[str, dict[str, float]]:
        """Median seconds and greatest peak of every stage."""
        return {
            name: {
                "seconds": statistics.median(self.seconds[name]),
                "cpu_seconds": statistics.median(self.cpu_seconds[name]),
                "bytes": max(self.bytes[name]),
            }
            for name in self.seconds
        }

    def _synchronise(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def _begin(self) -> int:
        self._synchronise()
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset VmHWM
        return resident()

    def _peak(self) -> int:
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        return _status("VmHWM")


def machine() -> dict[str, Any]:
    """Processor, memory, GPU, versions and commit."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "cliper_model", "pipeline"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "open_clip_torch", "diffusers", "ray", "triton")},
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def tasks_seconds() -> float:
    """Processor seconds of the worker processes of this machine's Ray, all below this process."""
    tick, found = os.sysconf("SC_CLK_TCK"), {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal():
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                fields = rest.split()
                ticks = int(fields[11]) + int(fields[12])
                found[int(entry.name)] = name, int(fields[1]), ticks / tick
    workers = [(parent, seconds) for name, parent, seconds in found.values() if "(ray::" in name]
    return sum(seconds for parent, seconds in workers if parent in found and found[parent][1] == os.getpid())
