"""Command-line options on how the input is read; they override the `input` section of a config."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from cliper.pipeline.config import JobConfig, validate

Opt = typer.Option
_PANEL = "Input"

Format = Annotated[
    str | None,
    Opt(help="auto (by the extension), images, list, parquet or tar", metavar="FORM", rich_help_panel=_PANEL),
]
ImageColumn = Annotated[
    str | None, Opt(help="Column of image bytes in Parquet", metavar="NAME", rich_help_panel=_PANEL)
]
IdColumn = Annotated[
    str | None, Opt(help="Column of image ids in Parquet and lists", metavar="NAME", rich_help_panel=_PANEL)
]
UriColumn = Annotated[str | None, Opt(help="Column of URIs in lists", metavar="NAME", rich_help_panel=_PANEL)]
Include = Annotated[
    list[str] | None,
    Opt(help="Label only images whose id matches; repeat for more", metavar="GLOB", rich_help_panel=_PANEL),
]
Exclude = Annotated[
    list[str] | None,
    Opt(help="Skip images whose id matches, e.g. '*.mask.png'; repeat", metavar="GLOB", rich_help_panel=_PANEL),
]
AnyName = Annotated[
    bool,
    Opt("--any-name", help="Read files of any name and recognize images by content", rich_help_panel=_PANEL),
]
Truncated = Annotated[
    str | None,
    Opt(help="Files whose last bytes are missing: refuse or accept", metavar="WHAT", rich_help_panel=_PANEL),
]
SkipDamaged = Annotated[
    bool,
    Opt("--skip-damaged", help="Skip the rest of a damaged tar instead of stopping", rich_help_panel=_PANEL),
]


@dataclass(frozen=True)
class InputOptions:
    """Values of the options above; None, empty or False keeps the config's value."""

    format: str | None = None
    image_column: str | None = None
    id_column: str | None = None
    uri_column: str | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    any_name: bool = False
    truncated: str | None = None
    skip_damaged: bool = False


def with_input(config: JobConfig, options: InputOptions) -> JobConfig:
    """The config with the options applied. Raises ConfigError for a value that is not allowed."""
    content: dict[str, Any] = config.model_dump() | {"shard": config.shard}
    content["input"] |= {key: value for key, value in asdict(options).items() if value}
    return validate(JobConfig, content, "command line")
