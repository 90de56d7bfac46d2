"""What commands share: options, running a job on Ray, its summary."""

import sys
from typing import Any

import yaml

from cliper.jobs.progress import FailureLimit, RunProgress
from cliper.jobs.session import ray_session
from cliper.model.errors import ConfigError
from cliper.model.presets import preset as apply_preset
from cliper.pipeline.config import JobConfig, validate
from cliper.pipeline.label.job import Job


def execute(job: Job, verbose: bool, limit: FailureLimit | None = None) -> None:
    """Label what is left of a job on Ray, and print the summary. Raises TooManyFailuresError."""
    shards = job.run.pending_shards(job.manifest)
    done = job.manifest.images_in(set(range(job.manifest.shards)) - set(shards))
    if done:
        print(f"continuing: {done} of {job.manifest.images} images are done", file=sys.stderr)
    with RunProgress(job.manifest.images, done) as progress:
        if shards:
            _label_shards(job, shards, progress, verbose, limit)
    print_summary(job, progress)


def _label_shards(
    job: Job, shards: list[int], progress: RunProgress, verbose: bool, limit: FailureLimit | None
) -> None:
    from cliper.pipeline.flow import label_corpus
    from cliper.pipeline.label.pool import plan_pool

    with ray_session(verbose) as nodes:
        pool = plan_pool(job.config.resources, nodes)
        arguments = (job.run, job.manifest, shards, job.kind.make, job.config, job.classes, pool, job.model)
        for summary in label_corpus(*arguments):
            progress.add(summary)
            if limit is not None:
                limit.check(progress)


def print_summary(job: Job, progress: RunProgress) -> None:
    """What this command did, on stdout."""
    failed = sum(progress.failures.values())
    rate = progress.images / max(progress.seconds, 1e-9)
    print(f"model     {job.model}")
    print(f"labeled   {progress.images - failed} images in {progress.seconds:.1f} s ({rate:.1f} images/s)")
    causes = ", ".join(f"{cause} {count}" for cause, count in progress.failures.most_common())
    print(f"failed    {failed}" + (f" ({causes})" if failed else ""))
    print(f"run       {job.run.uri}, {job.manifest.images} images in {job.manifest.shards} shards")
    print(f"identity  {job.run.fingerprint}")


def with_overrides(
    config: JobConfig, actors: int | None, cpus_per_actor: float | None, batch_size: int | None
) -> JobConfig:
    """The config with command-line values put in."""
    content = config.model_dump()
    given = {"actors": actors, "cpus_per_actor": cpus_per_actor}
    content["resources"] |= {key: value for key, value in given.items() if value is not None}
    if batch_size is not None:
        content["model"]["batch_size"] = batch_size
    return validate(JobConfig, content, "command line")


def with_preset(config: JobConfig, name: str) -> JobConfig:
    """The config with the changes of a preset (cliper_model/presets.py). Raises ConfigError."""
    return config.model_copy(update={"model": apply_preset(config.model, name)})


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs; values are YAML scalars (true, 3, text). Raises ConfigError."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise ConfigError("--storage-option expects KEY=VALUE, e.g. --storage-option anon=true")
    return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}
