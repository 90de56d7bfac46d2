"""The ways to evaluate: label and count, count a finished run, the whole table, a sweep of thresholds."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cliper.jobs.common import run_tasks
from cliper.jobs.options import Resources, with_overrides
from cliper.jobs.progress import RunProgress
from cliper.jobs.session import RaySession
from cliper.jobs.workers import connected
from cliper.model.errors import ConfigError
from cliper.pipeline.config import JobConfig, load_classes, suggest
from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.benchmarks import BenchmarkConfig, load_benchmark, shipped_benchmarks
from cliper.pipeline.evaluate.compare import table
from cliper.pipeline.evaluate.evaluation import (
    Evaluation,
    check_summary,
    count_stored,
    open_evaluation,
    require_labeled,
)
from cliper.pipeline.evaluate.metrics import PROTOCOLS, Protocol
from cliper.pipeline.evaluate.prepared import Prepared, open_prepared
from cliper.pipeline.evaluate.proposals import proposals
from cliper.pipeline.evaluate.results import Results, Setting, summarise
from cliper.pipeline.label.job import Job, open_job
from cliper.pipeline.label.segmenters import chosen
from cliper.pipeline.label.stages import Tasks
from cliper.pipeline.parallel import Workers
from cliper.pipeline.run.folder import Run, read_run
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import join


@dataclass(frozen=True)
class Options:
    """What the command line says about how to run, as opposed to what."""

    storage: Storage
    resources: Resources
    session: RaySession
    batch_size: int | None
    shard_images: int | None
    count_failed: bool
    workers: str | None = None  # see jobs/workers.py


def evaluate_live(
    name: str,
    config: BenchmarkConfig,
    variant: str | None,
    data: str,
    output: str,
    options: Options,
    protocol: Protocol | None = None,
) -> tuple[Results, str]:
    """Label the benchmark's images and count every shard as it is committed: results, and the page's URI.

    `protocol`: how the mean is taken, if not as in the config.
    """
    chosen = variant or next(iter(config.variants))
    prepared = _open_data(data, options.storage, config)
    with ExitStack() as held:
        job = _open_job(config, chosen, prepared, output, options, held)
        evaluation = open_evaluation(job.run, prepared, options.count_failed)
        pending = job.run.pending_shards(job.manifest)
        late = evaluation.uncounted_shards()
        if pending or late:
            options.session.connect()
            for _ in count_stored(evaluation, late, connected(options.workers, options.session)):
                pass
            _label_and_count(job, evaluation, pending, options.session)
        setting = Setting(
            protocol=protocol or config.protocol,
            decided_by=config.protocol,
            name=name,
            backbone=config.backbone,
            variant=chosen,
            model=job.model,
            published_miou=_published(config, chosen) if protocol in (None, config.protocol) else None,
        )
        return _finish(evaluation, setting, connected(options.workers, options.session))


def _label_and_count(job: Job, evaluation: Evaluation, shards: list[int], session: RaySession) -> None:
    if not shards:
        return
    total = job.manifest.images
    progress = RunProgress(total, total - job.manifest.images_in(shards))
    run_tasks(job, Tasks(shards), session, progress, evaluation.counter().stage, check_summary)


def evaluate_stored(
    run_uri: str,
    data: str,
    config: BenchmarkConfig | None,
    variant: str | None,
    protocol: str | None,
    options: Options,
) -> tuple[Results, str]:
    """Count a finished run's masks; neither a model nor torch is loaded."""
    run = read_run(run_uri, options.storage)
    require_labeled(run)
    prepared = _open_data(data, options.storage, config)
    evaluation = open_evaluation(run, prepared, options.count_failed)
    workers = connected(options.workers, options.session)
    for _ in count_stored(evaluation, evaluation.uncounted_shards(), workers):
        pass
    return _finish(evaluation, _stored_setting(run, config, variant, protocol), workers)


def _stored_setting(
    run: Run, config: BenchmarkConfig | None, variant: str | None, protocol: str | None
) -> Setting:
    decided, model = _decided_by(run)
    protocol_of_mean = find_protocol(protocol) if protocol else decided
    if config is None:
        return Setting(protocol_of_mean, decided, model=model)
    # Published figures apply to one model only: the run must have been labeled with that variant's settings.
    names = [variant] if variant else list(config.variants)
    same = [name for name in names if _same_model(config.job(name), run)]
    name = same[0] if same else ""
    published = _published(config, name) if same and protocol_of_mean == config.protocol else None
    return Setting(protocol_of_mean, decided, "", config.backbone if same else "", name, model, published)


def _decided_by(run: Run) -> tuple[Protocol, str]:
    """The protocol and the model that a run was labeled with; a segmenter without protocols counts as cliper."""
    model = run.identity["model"]
    if run.identity.get("segmenter", "cliper") != "cliper":
        return "cliper", run.identity["segmenter"]
    return model["labels"]["protocol"], model["backbone"]["model"]


def _same_model(config: JobConfig, run: Run) -> bool:
    model = chosen(config)[1].model.model_dump(mode="json")
    return (config.segmenter, model) == (run.identity.get("segmenter", "cliper"), run.identity["model"])


def find_protocol(name: str) -> Protocol:
    """A protocol by name. Raises EvaluationError."""
    for known in PROTOCOLS:
        if name == known:
            return known
    raise EvaluationError(f"unknown protocol '{name}'; {suggest(name, PROTOCOLS, 'allowed')}")


def evaluate_all(data: str, output: str, only: list[str], options: Options) -> str:
    """Every shipped config and variant whose data are prepared, one after the other: the table as Markdown.

    What is finished is not computed again; a benchmark whose data are not there is named and left out.
    """
    names = [name for name, _ in shipped_benchmarks()]
    unknown = [name for name in only if name not in names and not Path(name).is_file()]
    if unknown:
        known = suggest(unknown[0], names, "shipped")
        raise ConfigError(f"'{unknown[0]}' is neither a file nor a benchmark config; {known}")
    results, absent = [], set()
    for name in only or names:
        config = load_benchmark(name)
        where = _data_folder(data, config)
        if not options.storage.exists(join(where, "dataset.json")):
            absent.add(where)
            continue
        for variant in config.variants:
            print(f"{name}, {variant}", file=sys.stderr, flush=True)
            run_uri = join(output, f"{Path(name).stem}-{variant}")
            results.append(evaluate_live(name, config, variant, where, run_uri, options)[0])
    for where in sorted(absent):
        print(f"not prepared, left out: {where}", file=sys.stderr)
    if not results:
        raise EvaluationError(
            f"{data} holds no prepared benchmark; run 'cliper prepare' with --output {data}/BENCHMARK"
        )
    return table(results)


def _data_folder(data: str, config: BenchmarkConfig) -> str:
    """BENCHMARK, or BENCHMARK-TRUTH where a benchmark is published with several ground truths."""
    return join(data, config.benchmark if config.truth is None else f"{config.benchmark}-{config.truth}")


def run_sweep(
    config: BenchmarkConfig,
    variant: str | None,
    data: str,
    output: str,
    values: Mapping[str, list[Any]],
    options: Options,
) -> str:
    """Try every combination of settings: the results as Markdown."""
    from cliper.pipeline.evaluate.sweep import (
        make_grid,
        open_sweep,
        sweep_results,
        sweep_shards,
        sweep_table,
    )

    prepared = _open_data(data, options.storage, config)
    with ExitStack() as held:
        name = variant or next(iter(config.variants))
        make_grid(config.job(name), values)  # refuses before anything is written
        job = _open_job(config, name, prepared, output, options, held)
        grid = make_grid(job.config, values)
        evaluation = open_evaluation(job.run, prepared, options.count_failed)
        folder = open_sweep(evaluation, grid)
        pool = options.session.pool(job.config.resources)
        for _ in sweep_shards(evaluation, folder, job, grid, pool):
            pass
    rows = sweep_results(options.storage, folder, prepared, grid, config.protocol)
    return f"{sweep_table(rows)}\n{len(rows)} variants in {folder}"


def _open_data(uri: str, storage: Storage, config: BenchmarkConfig | None) -> Prepared:
    prepared = open_prepared(uri, storage)
    if config is not None and prepared.benchmark != config.benchmark:
        raise EvaluationError(f"{uri} holds {prepared.benchmark}, but the config is for {config.benchmark}")
    if config is not None and config.truth not in (None, prepared.truth_form):
        print(
            f"note: {uri} has the ground truth '{prepared.truth_form}'; published figures use '{config.truth}'",
            file=sys.stderr,
        )
    return prepared


def _open_job(
    config: BenchmarkConfig, variant: str, prepared: Prepared, output: str, options: Options, held: ExitStack
) -> Job:
    settings = config.job(variant)
    if options.shard_images is not None:
        shard = settings.shard.model_copy(update={"images": options.shard_images})
        settings = settings.model_copy(update={"shard": shard})
    settings = with_overrides(settings, options.resources, options.batch_size)
    classes, gpu = load_classes(config.classes), options.session.wants_gpu
    return open_job(prepared.index_uri, output, settings, classes, options.storage, held, gpu)


def _published(config: BenchmarkConfig, variant: str) -> float | None:
    percent = config.published_miou.get(variant)
    return None if percent is None else percent / 100


def _finish(evaluation: Evaluation, setting: Setting, workers: Workers = 1) -> tuple[Results, str]:
    """Verify, add up, and write the report."""
    from cliper.pipeline.evaluate.page import write_report

    counts = evaluation.read(workers)
    results = summarise(counts, evaluation.identity, setting, evaluation.prepared.expected)
    if (found := proposals(evaluation.counter(), counts)) is not None:
        results["proposals"] = found
    return results, write_report(evaluation, counts, results)
