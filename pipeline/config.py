"""The job's settings: YAML validated before Ray starts."""

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig, Settings
from cliper.model.errors import ClassListError, ConfigError

S = TypeVar("S", bound=Settings)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"  # installed beside this package


class InputConfig(Settings):
    """How the input is read. `format` auto goes by the URI's ending: .parquet or .csv is a list, .tar is
    WebDataset, anything else a folder, prefix or glob of image files."""

    format: Literal["auto", "images", "list", "parquet", "tar"] = "auto"
    id_column: str = "image_id"
    uri_column: str = "uri"
    image_column: str = "image"


class ShardConfig(Settings):
    """A shard is closed at `images` images or `megabytes` of encoded bytes, whichever comes first."""

    images: PositiveInt = 256
    megabytes: PositiveInt = 128


class ResourceConfig(Settings):
    """What the actors get; None is sized from the cluster: an actor per GPU, else one per four CPUs."""

    actors: PositiveInt | None = None
    cpus_per_actor: PositiveFloat | None = None
    threads: NonNegativeInt = 2  # decode and encode threads beside the model, per actor
    keep_heatmaps: NonNegativeInt = 0  # images of the first shard whose heat maps are written (label/heatmaps.py)
    image_seconds: PositiveFloat = 600  # an actor that is this long at each of its images hangs: it is killed


class JobConfig(Settings):
    """A labeling job: the model, and how the corpus goes through it."""

    segmenter: str = "cliper"
    model: CLIPerConfig = CLIPerConfig()
    input: InputConfig = InputConfig()
    mask_codec: str = "png"
    max_pixels: int = Field(100_000_000, gt=0, le=178_956_970)  # Pillow refuses more
    shard: ShardConfig = ShardConfig()
    resources: ResourceConfig = ResourceConfig()


def shipped(kind: str) -> dict[str, Path]:
    """Shipped files of `kind` ("label", "classes", ...) by name."""
    return {path.stem: path for path in sorted((CONFIGS / kind).glob("*")) if path.suffix in (".yaml", ".txt")}


def find(kind: str, name: str) -> Path:
    """Return the file called `name`: a path, or the name of a shipped one. Raises ConfigError."""
    path = Path(name)
    if path.is_file():
        return path
    known = shipped(kind)
    if name not in known:
        raise ConfigError(f"'{name}' is neither a file nor a shipped {kind} name; shipped: {', '.join(known)}")
    return known[name]


def load_config(name: str) -> JobConfig:
    """Read a YAML file or a shipped config by name. Raises ConfigError naming file, key and allowed values."""
    path = find("label", name)
    return validate(JobConfig, read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, or nothing. Raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of settings, not {type(content).__name__}")
    return content


def validate(schema: type[S], content: dict[str, Any], source: str) -> S:
    """Validate settings. Raises ConfigError with one line per problem."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = [_problem(schema, item) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


def _problem(schema: type[BaseModel], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location) or "settings"
    if item["type"] == "extra_forbidden":
        return f"unknown key '{key}'; allowed here: {', '.join(_keys_at(schema, location[:-1]))}"
    return f"{key}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})"


def _keys_at(schema: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the settings object at `path`."""
    current = schema
    for name in path:
        annotation = current.model_fields[name].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]  # X or X | None
        current = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(current.model_fields)


def load_classes(name: str) -> ClassList:
    """Read a class file or a shipped class list by name. Raises ClassListError or ConfigError."""
    path = find("classes", name)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ClassListError(f"{path} is not UTF-8 text: {error}") from error
    return ClassList.parse(lines, str(path))


def pick(setting: str, name: str, known: dict[str, Any]) -> Any:
    """Return known[name]. Raises ConfigError that names the setting and what is known."""
    if name not in known:
        raise ConfigError(f"unknown {setting} '{name}'; known: {', '.join(sorted(known))}")
    return known[name]
