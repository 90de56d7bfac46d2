"""`cliper evaluate --all --segmenter A,B,...`: several segmenters on every prepared benchmark, one table."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cliper.jobs.evaluations import Options, evaluate_live
from cliper.model.errors import ConfigError
from cliper.pipeline.config import load_config, shipped, suggest
from cliper.pipeline.errors import EvaluationError
from cliper.pipeline.evaluate.benchmarks import BenchmarkConfig, load_benchmark
from cliper.pipeline.evaluate.compare import Ranked, leaderboard_table
from cliper.pipeline.evaluate.metrics import Protocol
from cliper.pipeline.evaluate.registry import DATASETS
from cliper.pipeline.label.segmenters import SEGMENTERS, chosen
from cliper.pipeline.run.folder import read_run
from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.uris import join

OFFICIAL = "l14"  # the shipped benchmark configs that stand for `cliper`: BENCHMARK-l14


def evaluate_segmenters(
    data: str, output: str, names: Sequence[str], only: Sequence[str], protocol: Protocol, options: Options
) -> str:
    """Evaluate every segmenter on every prepared benchmark: the table as Markdown.

    `names`: ``cliper`` (the shipped benchmark configs), labeling configs, or YAML files. `only`: benchmarks, all
    by default. `protocol`: how the mean is taken, for all alike; each segmenter decides labels by its own rule.
    Finished parts are not computed again. Raises ConfigError before anything runs, EvaluationError if no
    benchmark is prepared.
    """
    unknown = [name for name in only if name not in DATASETS]
    if unknown:
        raise ConfigError(f"--only '{unknown[0]}' is no benchmark; {suggest(unknown[0], DATASETS)}")
    prepared = list(prepared_benchmarks(data, options.storage, only))
    if not prepared:
        raise EvaluationError(
            f"{data} holds no prepared benchmark; run 'cliper prepare' with --output {data}/BENCHMARK"
        )
    entries = [(b, where, n, entry_config(n, b)) for b, where in prepared for n in names]
    rows = []
    for _, where, name, config in entries:
        title = name if name in SEGMENTERS else Path(name).stem
        print(f"{Path(where).name}, {title}", file=sys.stderr, flush=True)
        run_uri = join(output, f"{Path(where).name}-{title}")
        results, _ = evaluate_live(title, config, None, where, run_uri, options, protocol)
        rows.append(Ranked(title, results, dict(read_run(run_uri, options.storage).identity["weights"])))
    return leaderboard_table(rows)


def prepared_benchmarks(data: str, storage: Storage, only: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(benchmark, folder) of every prepared benchmark below `data`: BENCHMARK or BENCHMARK-TRUTH."""
    for name, dataset in DATASETS.items():
        if (only and name not in only) or not dataset.classes:
            continue
        for folder in (name, *(f"{name}-{truth}" for truth in dataset.truths)):
            if storage.exists(join(data, folder, "dataset.json")):
                yield name, join(data, folder)


def entry_config(name: str, benchmark: str) -> BenchmarkConfig:
    """The benchmark config of a segmenter: of ``cliper`` the official one, of others their labeling config.

    Raises ConfigError for an unknown name or a wrong setting.
    """
    if name == "cliper":
        return load_benchmark(f"{benchmark}-{OFFICIAL}")
    if name not in shipped("label") and not Path(name).is_file():
        known = suggest(name, ["cliper", *shipped("label")], "shipped")
        raise ConfigError(f"--segmenter '{name}' is neither a file nor a labeling config; {known}")
    job = chosen(load_config(name))[1]
    model = job.model.model_dump(mode="json", exclude={"batch_size", "dtype"})
    protocol = model["labels"]["protocol"] if job.segmenter == "cliper" else "mmseg"
    content = {"segmenter": job.segmenter, "model": model, "backbone": name, "protocol": protocol}
    fixed = {"benchmark": benchmark, "classes": DATASETS[benchmark].classes, "variants": {"default": {}}}
    return BenchmarkConfig.model_validate(content | fixed)
