"""The `cliper` command: in a process of its own, or in this one, which costs no start of an interpreter."""

import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq

from cliper.jobs.cli import main

CLIPER = str(Path(sys.executable).parent / "cliper")
Done = subprocess.CompletedProcess[str]


def cliper(*arguments: str, timeout: float = 240, **environment: str) -> Done:
    """Run a command to its end in a process."""
    return subprocess.run(
        [CLIPER, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | environment,
    )


def started(command: list[str]) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        [CLIPER, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def cliper_here(*arguments: str, **environment: str) -> Done:
    """Run a command in this process, from its entry point. For commands that start no Ray."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["cliper", *arguments]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(["cliper", *arguments], code, stdout.getvalue(), stderr.getvalue())


def label_command(settings: dict[str, str], corpus: str | Path, output: str | Path = "", *more: str) -> list[str]:
    """The arguments of `cliper label` with the recorded weights (fixture `settings`)."""
    given = {"--output": str(output)} | settings
    return ["label", "--input", str(corpus), *(part for pair in given.items() for part in pair), *more]


def all_rows(output: Path) -> list[dict[str, object]]:
    """Every row of a run, in the order of its shards."""
    return [row for path in sorted((output / "labels").iterdir()) for row in pq.read_table(path).to_pylist()]


def wait_for_shards(output: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Wait until `count` shards are committed or the process has ended."""
    while process.poll() is None and len(list((output / "labels").glob("shard-*"))) < count:
        time.sleep(0.02)
