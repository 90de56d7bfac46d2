"""What `cliper agree` found, for the report: a line per other run. The file is written by evaluate/agree.py."""

from typing import Any

from cliper.pipeline.run.folder import Run
from cliper.pipeline.storage.digests import checked, with_digest
from cliper.pipeline.storage.sealed import DamagedFileError
from cliper.pipeline.storage.uris import join

SUMMARY = "agreement/summary.json"  # in the first run's folder: {digest of the runs: summary}


def read_summaries(run: Run) -> dict[str, dict[str, Any]]:
    """The stored summaries by digest; empty if the run was never compared. Raises DamagedFileError."""
    try:
        return checked(run.storage.read(join(run.uri, SUMMARY)), required=False)
    except FileNotFoundError:
        return {}


def add_summary(run: Run, digest: str, summary: dict[str, Any]) -> None:
    """Add or replace one summary; the report shows all of them. A damaged file is replaced."""
    try:
        before = read_summaries(run)
    except DamagedFileError:
        before = {}
    run.storage.write(join(run.uri, SUMMARY), with_digest(before | {digest: summary}, indent=1))
