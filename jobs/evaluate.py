"""`cliper evaluate`: label a benchmark and score it, score a finished run, compare runs, print the table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cliper.jobs.evaluations import (
    Options,
    evaluate_all,
    evaluate_live,
    evaluate_stored,
    find_protocol,
    run_sweep,
)
from cliper.jobs.leaderboard import evaluate_segmenters
from cliper.jobs.options import Resources, Verbose
from cliper.jobs.session import clean_stop, ray_session
from cliper.jobs.storage_options import StorageOption, parse_options
from cliper.jobs.workers import WorkersOption
from cliper.model.errors import ConfigError
from cliper.pipeline.config import parse_yaml
from cliper.pipeline.evaluate.benchmarks import load_benchmark
from cliper.pipeline.evaluate.compare import compare, matching, to_html, to_markdown
from cliper.pipeline.evaluate.results import Results, figures, heading
from cliper.pipeline.storage.backend import Storage

Opt = typer.Option


@dataclass(frozen=True)
class Mode:
    """A way to use the command: the arguments it needs, and those it takes besides."""

    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


# By the option that asks for it; without any of them, a benchmark is labeled and scored.
MODES = {
    "--compare": Mode((), ("--output",)),
    "--all": Mode(
        ("--data", "--output"),
        ("--only", "--segmenter", "--protocol", "--count-failed", "--shard-images", "--batch-size"),
    ),
    "--run": Mode(("--data",), ("BENCHMARK", "--variant", "--protocol", "--count-failed")),
    "--sweep": Mode(("BENCHMARK", "--data", "--output"), ("--variant", "--shard-images", "--batch-size")),
    "": Mode(
        ("BENCHMARK", "--data", "--output"), ("--variant", "--count-failed", "--shard-images", "--batch-size")
    ),
}


def evaluate(
    *,
    benchmark: Annotated[
        str | None,
        typer.Argument(
            help="Benchmark config: shipped (voc21-b16, ade20k-l14-mmseg, ...) or a YAML file", metavar="BENCHMARK"
        ),
    ] = None,
    data: Annotated[
        str | None, Opt(help="Prepared benchmark; with --all, the parent folder of several", metavar="URI")
    ] = None,
    output: Annotated[
        str | None,
        Opt(
            help="Run folder; with --all, the parent of all run folders; with --compare, an HTML file",
            metavar="URI",
        ),
    ] = None,
    run: Annotated[str | None, Opt(help="Score this finished labeling run; loads no model", metavar="URI")] = None,
    variant: Annotated[
        str | None, Opt(help="Variant of the benchmark config, e.g. sliding", metavar="NAME")
    ] = None,
    protocol: Annotated[str | None, Opt(help="With --run or --segmenter: cliper or mmseg", metavar="NAME")] = None,
    sweep: Annotated[
        list[str] | None,
        Opt(help="Settings to try, e.g. background_threshold=0.2,0.3; repeat", metavar="SETTING=A,B,..."),
    ] = None,
    everything: Annotated[bool, Opt("--all", help="Evaluate every shipped config and variant: the table")] = False,
    only: Annotated[
        list[str] | None, Opt(help="With --all: configs (with --segmenter: benchmarks) to run", metavar="CONFIG")
    ] = None,
    segmenter: Annotated[
        str | None,
        Opt(help="With --all: labeling configs to rank on all benchmarks, e.g. sam3,tipsv2", metavar="A,B,..."),
    ] = None,
    compare_runs: Annotated[
        tuple[str, str] | None, Opt("--compare", help="Compare two evaluated runs", metavar="A B")
    ] = None,
    count_failed: Annotated[bool, Opt("--count-failed", help="Count images without a mask as wrong")] = False,
    resources: Resources,
    batch_size: Annotated[int | None, Opt(min=1, help="Images per GPU batch; part of the run's identity")] = None,
    shard_images: Annotated[int | None, Opt(min=1, help="Images per shard; part of the run's identity")] = None,
    workers: WorkersOption = None,
    storage_option: StorageOption = None,
    verbose: Verbose = False,
) -> None:
    """Measure masks against a benchmark's ground truth: mIoU and other metrics.

    Run the same command again to continue: finished shards are neither labeled nor counted again.
    """
    asked = {
        "BENCHMARK": benchmark, "--data": data, "--output": output, "--run": run, "--variant": variant,
        "--protocol": protocol, "--sweep": sweep, "--all": everything, "--only": only, "--compare": compare_runs,
        "--segmenter": segmenter, "--count-failed": count_failed, "--batch-size": batch_size,
        "--shard-images": shard_images,
    }  # fmt: skip
    mode = find_mode(asked)
    storage = Storage(parse_options(storage_option or []))
    with clean_stop(output or run or "it"), ray_session(verbose, resources.wait) as session:
        options = Options(storage, resources, session, batch_size, shard_images, count_failed, workers)
        _do(mode, asked, options)


def _do(mode: str, asked: Mapping[str, Any], options: Options) -> None:
    """Evaluate in this mode and print the outcome."""
    config = None if asked["BENCHMARK"] is None else load_benchmark(asked["BENCHMARK"])
    data, output, variant = asked["--data"], asked["--output"], asked["--variant"]
    if mode == "--compare":
        first, second = asked["--compare"]
        comparison = compare(*matching(first, second, options.storage), options.storage)
        print(to_markdown(comparison))
        if output is not None:
            options.storage.write(output, to_html(comparison).encode())
            print(f"report    {output}")
    elif mode == "--all" and asked["--segmenter"]:
        names = [name.strip() for name in asked["--segmenter"].split(",") if name.strip()]
        protocol = find_protocol(asked["--protocol"] or "mmseg")
        print(evaluate_segmenters(data, output, names, asked["--only"] or [], protocol, options))
    elif mode == "--all":
        print(evaluate_all(data, output, asked["--only"] or [], options))
    elif mode == "--run":
        print_results(*evaluate_stored(asked["--run"], data, config, variant, asked["--protocol"], options))
    elif config is not None and mode == "--sweep":
        print(run_sweep(config, variant, data, output, parse_sweep(asked["--sweep"]), options))
    elif config is not None:
        print_results(*evaluate_live(asked["BENCHMARK"], config, variant, data, output, options))


def find_mode(asked: Mapping[str, Any]) -> str:
    """The mode that the given arguments ask for, a key of MODES.

    Raises ConfigError for two modes at once, a missing argument, or one that the mode has no use for.
    """
    given = [name for name, value in asked.items() if value not in (None, False, [])]
    modes = [name for name in given if name in MODES]
    if len(modes) > 1:
        raise ConfigError(f"{modes[0]} and {modes[1]} do not go together; give one of them")
    name = modes[0] if modes else ""
    mode = MODES[name]
    missing = [need for need in mode.needs if need not in given]
    if missing:
        raise ConfigError(
            f"{missing[0]} is missing; "
            "e.g. cliper evaluate voc21-b16 --data prepared/voc21 --output runs/voc21-b16"
        )
    useless = [arg for arg in given if arg not in (name, *mode.needs, *mode.takes)]
    if useless:
        what = f"with {name}" if name else "without --run, --all, --sweep or --compare"
        raise ConfigError(f"{useless[0]} has no effect {what}; leave it out, or see cliper evaluate --help")
    return name


def parse_sweep(texts: list[str]) -> dict[str, list[Any]]:
    """Parse SETTING=A,B,...; values are YAML scalars. Raises ConfigError."""
    values: dict[str, list[Any]] = {}
    for text in texts:
        name, separator, listed = text.partition("=")
        if not separator or not listed:
            raise ConfigError(f"--sweep '{text}': expected SETTING=A,B,..., e.g. background_threshold=0.2,0.3")
        values[name] = [parse_yaml(value, name) for value in listed.split(",")]
    return values


def print_results(results: Results, page: str) -> None:
    """Print the main figures and the report's path."""
    print(heading(results))
    for name, value in figures(results):
        print(f"  {name:<40} {value}")
    print(f"  {'report':<40} {page}")
