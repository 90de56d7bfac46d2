"""Command-line options that several commands share, in groups: a dataclass whose fields are the options."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Annotated, Any

import typer

from cliper.model.errors import ConfigError
from cliper.model.presets import preset as apply_preset
from cliper.pipeline.config import JobConfig, changed, validate

Opt = typer.Option
_INPUT = "Input"  # heading of the input options in --help

Verbose = Annotated[bool, Opt("--verbose", help="Show Ray's own messages")]


@dataclass(frozen=True)
class Resources:
    """Options on the actors; None keeps the config's value."""

    device: Annotated[
        str | None, Opt(help="cpu, cuda, or auto: GPUs if the cluster has any", metavar="DEVICE")
    ] = None
    actors: Annotated[
        str | None, Opt(help="Segmenting actors, or MIN:MAX; default: one per free GPU", metavar="N|MIN:MAX")
    ] = None
    actors_per_gpu: Annotated[int | None, Opt(min=1, help="Actors that share a GPU")] = None
    cpus_per_actor: Annotated[float | None, Opt(min=0.1, help="CPUs reserved for each actor")] = None
    accelerator_type: Annotated[
        str | None, Opt(help="Use only GPUs of this type, by Ray's name: A100, T4, ...", metavar="TYPE")
    ] = None
    wait_for_resources: Annotated[
        str,
        Opt(help="Wait this long for free resources, e.g. 10m; asks the autoscaler for nodes", metavar="DURATION"),
    ] = "0"

    @property
    def wait(self) -> float:
        """Seconds to wait for free resources. Raises ConfigError."""
        return parse_duration(self.wait_for_resources)


@dataclass(frozen=True)
class InputOptions:
    """Options on how the input is read; None, empty or False keeps the config's value."""

    format: Annotated[
        str | None,
        Opt(help="auto (by the extension), images, list, parquet or tar", metavar="FORM", rich_help_panel=_INPUT),
    ] = None
    image_column: Annotated[
        str | None, Opt(help="Column of image bytes in Parquet", metavar="NAME", rich_help_panel=_INPUT)
    ] = None
    id_column: Annotated[
        str | None, Opt(help="Column of image ids in Parquet and lists", metavar="NAME", rich_help_panel=_INPUT)
    ] = None
    uri_column: Annotated[
        str | None, Opt(help="Column of URIs in lists", metavar="NAME", rich_help_panel=_INPUT)
    ] = None
    include: Annotated[
        list[str] | None,
        Opt(help="Label only images whose id matches; repeat for more", metavar="GLOB", rich_help_panel=_INPUT),
    ] = None
    exclude: Annotated[
        list[str] | None,
        Opt(
            help="Skip images whose id matches, e.g. '*.mask.png'; repeat", metavar="GLOB", rich_help_panel=_INPUT
        ),
    ] = None
    any_name: Annotated[
        bool,
        Opt("--any-name", help="Read files of any name and recognize images by content", rich_help_panel=_INPUT),
    ] = False
    truncated: Annotated[
        str | None,
        Opt(help="Files whose last bytes are missing: refuse or accept", metavar="WHAT", rich_help_panel=_INPUT),
    ] = None
    skip_damaged: Annotated[
        bool,
        Opt("--skip-damaged", help="Skip the rest of a damaged tar instead of stopping", rich_help_panel=_INPUT),
    ] = False


def ungrouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: each field of a group is an option, in the group's place."""
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[name] = group
            parameters += inspect.signature(group, eval_str=True).parameters.values()
        else:
            parameters.append(parameter)

    def call(**values: Any) -> None:
        made = {
            name: group(**{each.name: values.pop(each.name) for each in fields(group)})
            for name, group in groups.items()
        }
        command(**made, **values)

    listed = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]  # inspect reads it
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__doc__ = command.__doc__
    return call


def with_overrides(
    config: JobConfig, resources: Resources, batch_size: int | None = None, keep_heatmaps: int | None = None
) -> JobConfig:
    """The config with the command-line values applied. Raises ConfigError."""
    content = config.model_dump() | {"shard": config.shard}  # which remembers what the user has set
    given = asdict(resources) | {"keep_heatmaps": keep_heatmaps}
    del given["wait_for_resources"]
    if resources.actors is not None:
        given["actors"] = parse_actors(resources.actors)
    content["resources"] |= {key: value for key, value in given.items() if value is not None}
    if batch_size is not None:
        content["batch_size"] = batch_size
        content["model"].pop("batch_size", None)
    return validate(JobConfig, content, "command line")


def with_input(config: JobConfig, options: InputOptions) -> JobConfig:
    """The config with the options applied. Raises ConfigError for a value that is not allowed."""
    content: dict[str, Any] = config.model_dump() | {"shard": config.shard}
    content["input"] |= {key: value for key, value in asdict(options).items() if value}
    return validate(JobConfig, content, "command line")


def with_preset(config: JobConfig, name: str) -> JobConfig:
    """The config with the changes of a preset (cliper_model/presets.py). Raises ConfigError."""
    return config if name == "exact" else changed(config, model=apply_preset(config.cliper, name))


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
