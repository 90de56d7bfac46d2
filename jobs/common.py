"""Shared parts of the commands: options, running a job on Ray, its summary."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

import typer

from cliper.jobs.progress import FailureLimit, RunProgress
from cliper.jobs.session import RaySession, say
from cliper.model.errors import ConfigError
from cliper.model.presets import preset as apply_preset
from cliper.pipeline.config import JobConfig, backbone_of, changed, embedded_note, validate
from cliper.pipeline.label.job import Job
from cliper.pipeline.label.stages import Task, Tasks
from cliper.pipeline.run.changed import changed_shards, forget_changed, read_changed
from cliper.pipeline.run.failed import forget_counts
from cliper.pipeline.run.reader import torn_shards
from cliper.pipeline.run.shards import require_visible

if TYPE_CHECKING:
    import pyarrow as pa

Opt = typer.Option

# Options that several commands have.
Device = Annotated[str | None, Opt(help="cpu, cuda, or auto: GPUs if the cluster has any", metavar="DEVICE")]
Actors = Annotated[
    str | None, Opt(help="Segmenting actors, or MIN:MAX; default: one per free GPU", metavar="N|MIN:MAX")
]
ActorsPerGpu = Annotated[int | None, Opt(min=1, help="Actors that share a GPU")]
CpusPerActor = Annotated[float | None, Opt(min=0.1, help="CPUs reserved for each actor")]
AcceleratorType = Annotated[
    str | None, Opt(help="Use only GPUs of this type, by Ray's name: A100, T4, ...", metavar="TYPE")
]
WaitForResources = Annotated[
    str,
    Opt(help="Wait this long for free resources, e.g. 10m; asks the autoscaler for nodes", metavar="DURATION"),
]


def execute(job: Job, session: RaySession, limit: FailureLimit | None = None) -> None:
    """Label what is left of a job on Ray, and print the summary. Raises TooManyFailuresError."""
    torn = torn_shards(job.run, job.manifest)
    if torn:
        say(f"{len(torn)} label files are cut off or another's, the first of shard {torn[0]}: labeled again")
    shards = sorted({*job.run.pending_shards(job.manifest), *torn})
    again = _changed(job, shards)
    done = job.manifest.images_in(set(range(job.manifest.shards)) - set(shards)) - sum(again.values())
    already = f", {done} of them done" if done else ""
    say(f"{job.manifest.images} images in {job.manifest.shards} shards{already}")
    progress = RunProgress(job.manifest.images, done)
    tasks: Sequence[Task] = Tasks(shards)
    if again:
        tasks = [*tasks, *(Task(shard, changed=True) for shard in again)]
    if tasks:
        run_tasks(job, tasks, session, progress, counted=partial(_settled, job, again), limit=limit)
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
    counted: Callable[[dict[str, Any]], dict[str, Any]] = lambda summary: summary,
    limit: FailureLimit | None = None,
) -> None:
    """Label shards on Ray and add the summary of each commit, after `counted`, to `progress`.

    `then`: see label_corpus. Raises ResourceError, TooManyFailuresError, and the errors of `counted`.
    """
    from cliper.pipeline.flow import label_corpus

    session.connect()
    board = f"{job.run.fingerprint}/{uuid4().hex}"
    with progress.watching(board, job.run):
        progress.enter("reserving actors")
        pool = session.pool(job.config.resources)
        progress.enter("loading the model")
        for summary in label_corpus(job, tasks, pool, then, board):
            require_visible(job.run.storage, job.run.uri, summary["shard"])
            progress.add(counted(summary))
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
    print(f"run       {job.run.uri}, {job.manifest.images} images in {job.manifest.shards} shards")
    print(f"identity  {job.run.fingerprint}")
    note = embedded_note(backbone_of(job.config))
    if note:
        print(f"note      {note}")


@dataclass(frozen=True)
class Resources:
    """Command-line options on actors; None keeps the config's value."""

    device: str | None = None
    actors: str | None = None
    actors_per_gpu: int | None = None
    cpus_per_actor: float | None = None
    accelerator_type: str | None = None
    keep_heatmaps: int | None = None


def with_overrides(config: JobConfig, resources: Resources, batch_size: int | None = None) -> JobConfig:
    """The config with the command-line values applied. Raises ConfigError."""
    content = config.model_dump() | {"shard": config.shard}  # which remembers what the user has set
    given = {key: value for key, value in asdict(resources).items() if value is not None}
    if resources.actors is not None:
        given["actors"] = parse_actors(resources.actors)
    content["resources"] |= given
    if batch_size is not None:
        content["batch_size"] = batch_size
        content["model"].pop("batch_size", None)
    return validate(JobConfig, content, "command line")


def parse_actors(text: str) -> int | dict[str, int]:
    """Parse "4", or "1:64" for a pool that scales with the cluster. Raises ConfigError."""
    numbers = text.split(":")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ConfigError(f"--actors '{text}': expected a number of at least 1, or MIN:MAX, e.g. 1:64")
    return int(text) if len(numbers) == 1 else {"min": int(numbers[0]), "max": int(numbers[1])}


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "10m" or "1h". Raises ConfigError."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise ConfigError(f"'{text}' is not a duration; expected e.g. 90s, 10m or 2h")
    return seconds


def with_preset(config: JobConfig, name: str) -> JobConfig:
    """The config with the changes of a preset (cliper_model/presets.py). Raises ConfigError."""
    return config if name == "exact" else changed(config, model=apply_preset(config.cliper, name))
