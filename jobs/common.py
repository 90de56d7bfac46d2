"""Shared parts of the commands: running a job on Ray, and its summary."""

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from cliper.jobs.progress import FailureLimit, RunProgress
from cliper.jobs.session import RaySession, say
from cliper.pipeline.config import backbone_of, counted, embedded_note
from cliper.pipeline.label.job import Job
from cliper.pipeline.label.stages import Task, Tasks
from cliper.pipeline.run.changed import changed_shards, forget_changed, read_changed
from cliper.pipeline.run.failed import forget_counts
from cliper.pipeline.run.reader import torn_shards
from cliper.pipeline.run.shards import require_visible

if TYPE_CHECKING:
    import pyarrow as pa


def execute(job: Job, session: RaySession, limit: FailureLimit | None = None) -> None:
    """Label what is left of a job on Ray, and print the summary. Raises TooManyFailuresError."""
    torn = torn_shards(job.run, job.manifest)
    if torn:
        say(f"{len(torn)} label files are cut off or another's, the first of shard {torn[0]}: labeled again")
    shards = sorted({*job.run.pending_shards(job.manifest), *torn})
    again = _changed(job, shards)
    done = job.manifest.images_in(set(range(job.manifest.shards)) - set(shards)) - sum(again.values())
    already = f", {done} of them done" if done else ""
    say(f"{counted(job.manifest.images, 'image')} in {counted(job.manifest.shards, 'shard')}{already}")
    progress = RunProgress(job.manifest.images, done)
    tasks: Sequence[Task] = Tasks(shards)
    if again:
        tasks = [*tasks, *(Task(shard, changed=True) for shard in again)]
    if tasks:
        run_tasks(job, tasks, session, progress, accept=partial(_settled, job, again), limit=limit)
    print_summary(job, progress)


def _changed(job: Job, shards: Collection[int]) -> dict[int, int]:
    """The number of replaced images by finished shard; evaluation counts of these shards are removed.

    A shard of `shards` is labeled whole, as the manifest lists it now.
    """
    found, whole = changed_shards(job.run), set(shards)
    for shard in whole.intersection(found):
        forget_changed(job.run, shard)
    again = {shard: len(read_changed(job.run, shard)) for shard in found if shard not in whole}
    if again:
        say(f"{sum(again.values())} images changed since they were labeled: labeled again")
        forget_counts(job.run, again)
    return again


def _settled(job: Job, again: Collection[int], summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of a commit; replaced images of its shard are not waiting any more."""
    if summary["shard"] in again:
        forget_changed(job.run, summary["shard"])
    return summary


def run_tasks(
    job: Job,
    tasks: Sequence[Task],
    session: RaySession,
    progress: RunProgress,
    then: "Callable[[pa.Table], pa.Table] | None" = None,
    accept: Callable[[dict[str, Any]], dict[str, Any]] = lambda summary: summary,
    limit: FailureLimit | None = None,
) -> None:
    """Label shards on Ray and add the summary of each commit, after `accept`, to `progress`.

    `then`: see label_corpus. Raises ResourceError, TooManyFailuresError, and the errors of `accept`.
    """
    from cliper.pipeline.flow import label_corpus

    session.connect()
    board = f"{job.run.fingerprint}/{uuid4().hex}"
    with progress.watching(board, job.run):
        progress.enter("reserving actors")
        pool = session.pool(job.config.resources)
        progress.enter("loading the model")
        with closing(label_corpus(job, tasks, pool, then, board)) as commits:
            for summary in commits:
                require_visible(job.run.storage, job.run.uri, summary["shard"])
                progress.add(accept(summary))
                if limit is not None:
                    limit.check(progress)


def print_summary(job: Job, progress: RunProgress) -> None:
    """Print the labeled and failed images of this command, and the run's size and identity."""
    failed = sum(progress.failures.values())
    rate = progress.images / max(progress.seconds, 1e-9)
    print(f"model     {job.model}")
    print(f"labeled   {progress.images - failed} images in {progress.seconds:.1f} s ({rate:.1f} images/s)")
    causes = ", ".join(f"{cause} {count}" for cause, count in progress.failures.most_common())
    print(f"failed    {failed}" + (f" ({causes})" if failed else ""))
    if progress.several:
        print(f"notice    {progress.several} files have more pages or frames than the one that is labeled")
    images, shards = counted(job.manifest.images, "image"), counted(job.manifest.shards, "shard")
    print(f"run       {job.run.uri}, {images} in {shards}")
    print(f"identity  {job.run.fingerprint}")
    note = embedded_note(backbone_of(job.config))
    if note:
        print(f"note      {note}")
