"""The job's settings: YAML validated before Ray starts."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cliper.model.class_text import class_lines
from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig, Settings
from cliper.model.errors import ClassListError, ConfigError

S = TypeVar("S", bound=Settings)

EMBEDDED_CLASSES = "tiny"  # the list that the embedded model was trained for
SHARED = frozenset({"batch_size", "dtype"})  # settings of every segmenter; in version 0.1 they stood in `model`
YAML_BYTES, YAML_DEPTH, YAML_NODES = 1 << 16, 40, 20_000  # of settings
_KINDS = {"label": "config", "classes": "class list", "benchmarks": "benchmark config"}
CONFIGS = Path(__file__).resolve().parent.parent / "configs"  # installed beside this package


class InputConfig(Settings):
    """How the input is read; docs/INPUTS.md has the forms and formats.

    `format`: auto goes by the URI's ending: lists (.parquet .csv .tsv .txt .jsonl .json), .tar is WebDataset,
    anything else a folder, prefix or glob of image files. `include`, `exclude`: globs on the image id; one without
    a slash is for the last part. `any_name`: take files without an image's ending, by content. `truncated`: a file
    whose last bytes are missing fails, or is labeled with the pixels it has. `skip_damaged`: continue after
    a damaged tar, without the members behind the damage.
    """

    format: Literal["auto", "images", "list", "parquet", "tar"] = "auto"
    id_column: str = "image_id"
    uri_column: str = "uri"
    image_column: str = "image"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    any_name: bool = False
    truncated: Literal["refuse", "accept"] = "refuse"
    skip_damaged: bool = False


class ShardConfig(Settings):
    """A shard is closed at `images` images or `megabytes` of encoded bytes, whichever comes first.

    A row group of images in Parquet stays whole, to be read once, up to 4 times the bytes and 32 times the images.
    """

    images: PositiveInt = 256
    megabytes: PositiveInt = 128


class ActorRange(Settings):
    """A number of actors that follows the cluster: work starts with `min`, and more are added up to `max`."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> "ActorRange":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class ResourceConfig(Settings):
    """Resources of the actors; None is sized to the cluster's free resources: `actors_per_gpu` on each GPU, else
    one actor per four CPUs.

    `device`: auto takes GPUs if the cluster has some. `accelerator_type` (Ray's name: A100, T4, ...), `custom`
    (amounts of custom resources) and `labels` choose the nodes on which actors run.

    Loading the images of a shard from a remote store may take `load_seconds`, plus their bytes at `load_rate`; a
    store that is slower counts as stalled.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    actors: PositiveInt | ActorRange | None = None
    actors_per_gpu: PositiveInt = 1
    cpus_per_actor: PositiveFloat | None = None
    accelerator_type: str | None = None
    custom: dict[str, PositiveFloat] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    threads: NonNegativeInt = 2  # decode and encode threads beside the model, per actor
    keep_heatmaps: NonNegativeInt = 0  # images of the first shard whose heat maps are written (label/heatmaps.py)
    image_seconds: PositiveFloat = 600  # an actor that is this long at each of its images hangs: it is killed
    load_seconds: PositiveFloat = 180  # the default has room for all retries of one request
    load_rate: PositiveFloat = 50_000  # bytes per second


class UncheckedSettings(Settings):
    """`model` of a segmenter other than CLIPer, until `label.segmenters.chosen` validates it by its schema."""

    model_config = ConfigDict(extra="allow", frozen=True)


class JobConfig(Settings):
    """A labeling job: the segmenter, its own settings in `model`, and how the corpus goes through it.

    `batch_size` (images on the device at once) and `dtype` are of every segmenter. Both may also be given in
    `model`, their place in version 0.1; CLIPer's settings hold a copy.
    """

    segmenter: str = "cliper"
    batch_size: PositiveInt = 8
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    model: SerializeAsAny[Settings] = Field(default_factory=CLIPerConfig, validate_default=True)
    input: InputConfig = InputConfig()
    mask_codec: str = "png"
    max_pixels: int = Field(100_000_000, gt=0, le=178_956_970)  # Pillow refuses more
    shard: ShardConfig = ShardConfig()
    resources: ResourceConfig = ResourceConfig()

    @property
    def cliper(self) -> CLIPerConfig:
        """The settings of the segmenter `cliper`. Raises ConfigError for another one."""
        if not isinstance(self.model, CLIPerConfig):
            raise ConfigError(f"this needs the segmenter 'cliper'; the configuration has '{self.segmenter}'")
        return self.model

    @model_validator(mode="before")
    @classmethod
    def _lift_shared(cls, content: Any) -> Any:
        """Take SHARED settings from `model` as those of the job. Raises ValueError if both differ."""
        model = content.get("model") if isinstance(content, dict) else None
        found = dict(model) if isinstance(model, dict | BaseModel) else {}
        given = {name: found[name] for name in SHARED if name in found}
        for name, value in given.items():
            if content.get(name, value) != value:
                raise ValueError(f"{name} is {content[name]}, but model.{name} is {value}; give it once")
        return content | given if given else content

    @field_validator("model", mode="before")
    @classmethod
    def _choose_schema(cls, model: Any, info: ValidationInfo) -> Any:
        """CLIPer's settings with the job's SHARED ones; those of another segmenter without them, unchecked."""
        if info.data.get("segmenter") == "cliper":
            shared = {name: info.data[name] for name in SHARED if name in info.data}
            return CLIPerConfig.model_validate(_own(model) | shared if _holds_keys(model) else model)
        if isinstance(model, Settings) and not isinstance(model, CLIPerConfig | UncheckedSettings):
            return model  # validated by the segmenter's own schema
        if isinstance(model, CLIPerConfig):  # the default: nothing was given
            return UncheckedSettings()
        if not _holds_keys(model):
            return UncheckedSettings.model_validate(model)
        return UncheckedSettings(**_own(model))


def _holds_keys(model: Any) -> bool:
    return isinstance(model, dict | BaseModel)


def _own(model: dict[str, Any] | BaseModel) -> dict[str, Any]:
    """The settings in `model` that are the segmenter's own."""
    return {name: value for name, value in dict(model).items() if name not in SHARED}


def changed(config: JobConfig, **settings: Any) -> JobConfig:
    """The configuration with other settings, validated as a whole; SHARED settings of a new `model` count.

    Raises pydantic's ValidationError, a ValueError.
    """
    content = {name: getattr(config, name) for name in JobConfig.model_fields} | settings
    if "model" in settings:
        content = {name: value for name, value in content.items() if name not in SHARED or name in settings}
    else:
        declared = SHARED & settings.keys() & type(config.model).model_fields.keys()
        content["model"] = config.model.model_copy(update={name: settings[name] for name in declared})
    return JobConfig(**content)


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
        raise ConfigError(
            f"'{name}' is neither a file nor a shipped {_KINDS.get(kind, kind)}; {suggest(name, known, 'shipped')}"
        )
    return known[name]


def counted(number: float, noun: str) -> str:
    """E.g. "1 shard", "1,200 shards", "0.5 CPUs"."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}" if number == 1 else f"{shown} {noun}s"


def suggest(name: str, known: Iterable[str], word: str = "known") -> str:
    """The names to use instead of a wrong one: those close to it, and all."""
    listed = list(known)
    close = difflib.get_close_matches(name.lower(), listed, n=3)
    return (f"did you mean {' or '.join(close)}? " if close else "") + f"{word}: {', '.join(listed)}"


def load_config(name: str) -> JobConfig:
    """Read a YAML file or a shipped config by name. Raises ConfigError naming file, key and allowed values."""
    path = find("label", name)
    return validate(JobConfig, read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, or nothing. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            text = file.read(YAML_BYTES + 1).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    content = parse_yaml(text, str(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of settings, not {type(content).__name__}")
    return content


def parse_yaml(text: str, source: str) -> Any:
    """Plain values of YAML text, at most YAML_BYTES long, YAML_DEPTH deep and YAML_NODES large with its aliases
    expanded. Raises ConfigError.
    """
    if len(text.encode("utf-8", "surrogatepass")) > YAML_BYTES:
        raise ConfigError(f"{source}: more than {YAML_BYTES:,} bytes; settings are shorter")
    try:
        _check_yaml_size(text, source)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that is none
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())[:500]}") from error


def _check_yaml_size(text: str, source: str) -> None:
    """Raise ConfigError for nesting or aliases that would grow without bound; reads events, builds nothing."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # (anchor, nodes before it)
    count = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.NodeEvent):
            count += sizes.get(event.anchor or "", 1) if isinstance(event, yaml.AliasEvent) else 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, count - 1))
        if count > YAML_NODES or len(open_nodes) > YAML_DEPTH:
            raise ConfigError(
                f"{source}: more than {YAML_NODES:,} values, or nested more than {YAML_DEPTH} deep; settings are "
                "smaller"
            )


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
        annotation = CLIPerConfig if name == "model" else current.model_fields[name].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]  # X or X | None
        current = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(current.model_fields)


def load_classes(name: str) -> ClassList:
    """Read a class file or a shipped class list by name. Raises ClassListError or ConfigError."""
    path = find("classes", name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClassListError(f"{path} is not UTF-8 text: {error}") from error
    return ClassList.parse(class_lines(text, str(path)), str(path))


def classes_for(name: str | None, config: JobConfig) -> ClassList:
    """The class list called `name`; without one, that of the embedded model. Raises as load_classes does.

    Raises ConfigError for another model without classes: it has none of its own.
    """
    if name is None:
        model = backbone_of(config)
        if not model.startswith("embedded:"):
            raise ConfigError(
                f"--classes is needed: {model} has no classes of its own. Give a file with one class per line, or "
                f"a shipped list: {', '.join(shipped('classes'))}"
            )
    return load_classes(name or EMBEDDED_CLASSES)


def backbone_of(config: JobConfig) -> str:
    """The name of CLIPer's backbone, e.g. "embedded:tiny" or "ViT-L-14"; that of another segmenter."""
    return config.model.backbone.model if isinstance(config.model, CLIPerConfig) else config.segmenter


def embedded_note(model: str) -> str | None:
    """What the embedded model is for, as one sentence; None for another backbone, e.g. "ViT-L-14"."""
    if not model.startswith("embedded:"):
        return None
    known = len(load_classes(EMBEDDED_CLASSES))
    return f"the embedded model knows {known} drawn classes; your photographs need --config vit-l-14"


def describe_classes(classes: ClassList, most: int = 5) -> str:
    """How many classes there are, and the first of them, in one line."""
    more = ", ..." if len(classes) > most else ""
    return f"{len(classes)}: {', '.join(classes.names[:most])}{more}"


def lookup(setting: str, name: str, known: dict[str, Any]) -> Any:
    """Return known[name]. Raises ConfigError that names the setting and the known values."""
    if name not in known:
        raise ConfigError(f"unknown {setting} '{name}'; {suggest(name, sorted(known))}")
    return known[name]
