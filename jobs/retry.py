"""`cliper retry`: label the failed images of a run again and replace their rows."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated

import typer

from cliper.jobs.common import run_tasks
from cliper.jobs.options import Resources, Verbose, with_overrides
from cliper.jobs.progress import RunProgress
from cliper.jobs.session import RaySession, clean_stop, ray_session
from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.pipeline.config import counted
from cliper.pipeline.label.job import Job
from cliper.pipeline.label.segmenters import chosen
from cliper.pipeline.label.stages import Task
from cliper.pipeline.run.failed import Failed, find_failed, forget_counts, require_same, stored_settings
from cliper.pipeline.run.folder import Run, read_run
from cliper.pipeline.run.lease import hold
from cliper.pipeline.run.status import read_status
from cliper.pipeline.storage.backend import Storage

Opt = typer.Option


def retry(
    *,
    run: Annotated[str, typer.Argument(help="Run folder: local path or s3:// prefix", metavar="RUN")],
    error_type: Annotated[
        list[str] | None,
        Opt(help="Only rows with this error (missing, corrupt, poison, ...); repeat for more", metavar="TYPE"),
    ] = None,
    resources: Resources,
    storage_option: StorageOption = None,
    verbose: Verbose = False,
) -> None:
    """Label the failed images of RUN again, with the settings of the run, and replace their rows.

    Rows with a mask are not changed. An image that fails again stays a failed row, with the new reason and one
    more attempt. After an interruption, run the same command again. Evaluation counts of the changed shards are
    removed; the next 'cliper evaluate' recounts them.
    """
    with clean_stop(run), ray_session(verbose, resources.wait) as session:
        opened = read_run(run, Storage(parse_options(storage_option or [])))
        with hold(opened.uri, opened.storage):
            job = open_stored(opened, resources)
            failed = find_failed(opened, job.manifest, error_type or [])
            if failed:
                print_outcome(failed, retry_failed(job, failed, session))
            else:
                print(f"nothing to retry: {_causes(read_status(opened).failures or {})}")


def open_stored(run: Run, resources: Resources) -> Job:
    """The job a run was made by, from run.json. Raises RunError if it would now write something else."""
    manifest = run.manifest()
    settings, classes = stored_settings(run)
    kind, config = chosen(with_overrides(settings, resources))
    pinned = kind.pin(config)
    weights = kind.identity(pinned)
    require_same(run, config, classes, weights)
    return Job(run, manifest, pinned, classes, kind.verified(weights), kind.describe(config))


def retry_failed(job: Job, failed: dict[int, Failed], session: RaySession) -> RunProgress:
    """Label the failed images on Ray; returns the counts of images tried and failed again."""
    forget_counts(job.run, failed)
    progress = RunProgress(sum(len(f.image_ids) for f in failed.values()), 0)
    tasks = [Task(shard, again) for shard, again in failed.items()]
    tried = lambda summary: summary | {"images": len(failed[summary["shard"]].image_ids)}  # noqa: E731
    run_tasks(job, tasks, session, progress, accept=tried)
    return progress


def print_outcome(failed: dict[int, Failed], progress: RunProgress) -> None:
    """Print the number of images tried, and the failures that remain by cause."""
    retried = f"{counted(progress.images, 'image')} in {counted(len(failed), 'shard')}"
    print(f"retried   {retried} ({progress.seconds:.1f} s)")
    print(f"left      {_causes(progress.failures)} in these shards")


def _causes(failures: Mapping[str, int]) -> str:
    if not failures:
        return "no row failed"
    listed = ", ".join(f"{cause} {count}" for cause, count in Counter(failures).most_common())
    return f"{sum(failures.values())} rows failed ({listed})"
