"""Models in the form of transformers: a folder or hub id to files, their architecture, and the loaded network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cliper.model.errors import ConfigError, WeightsError
from cliper.model.loading.choose import choose_network, choose_pretrained
from cliper.model.loading.files import read_json, sha256_of
from cliper.model.loading.hub import fetch, names_in

if TYPE_CHECKING:
    import torch

TOKENIZERS = {"tokenizer.json", "vocab.json", "spiece.model", "sentencepiece.bpe.model"}


@dataclass(frozen=True)
class Pretrained:
    """A resolved model: its folder, and the hub's commit if it comes from the hub."""

    folder: Path
    commit: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that affects the model's output."""
        return tuple(self.folder / name for name in choose_pretrained(names_in(self.folder)))

    @property
    def weights(self) -> list[Path]:
        """The files that hold tensors."""
        found = choose_network([f"model/{path.name}" for path in self.files], "model")
        assert not isinstance(found, str)  # choose_pretrained has found them
        return [self.folder / name.removeprefix("model/") for name in found.weights]

    @property
    def kind(self) -> str:
        """`model_type` of the configuration, e.g. "dinov2"."""
        return str(read_json(self.folder / "config.json").get("model_type"))


def resolve_pretrained(model: str, revision: str | None, setting: str) -> Pretrained:
    """Locate the model that `setting` names; the files of a hub id are downloaded if they are not in the cache.

    Raises WeightsError for an incomplete folder, a gated or unknown repository, or a download that failed.
    """

    def choose(names: Any) -> list[str]:
        try:
            return choose_pretrained(names)
        except WeightsError as error:
            raise WeightsError(f"{setting} '{model}': {error}") from error

    if Path(model).is_dir():
        choose(names_in(Path(model)))
        return Pretrained(Path(model))
    if model.startswith((".", "/", "~")):
        raise WeightsError(f"{setting} '{model}' is not a folder on this machine")
    folder = fetch(model, revision, choose)
    return Pretrained(folder, folder.name)


def architecture(found: Pretrained, classes: Mapping[str, str], setting: str) -> Any:
    """The class of transformers for a model whose `model_type` is a key of `classes`.

    Raises WeightsError for another kind of model, ConfigError if the installed transformers lacks the class.
    """
    from cliper.model._libraries import transformers

    if found.kind not in classes:
        raise WeightsError(
            f"{setting}: {found.folder} holds a model of type '{found.kind}'; supported: {', '.join(classes)}"
        )
    name = classes[found.kind]
    if not hasattr(transformers, name):
        raise ConfigError(
            f"{setting} needs {name}, which transformers {transformers.__version__} lacks; "
            "pip install -U transformers"
        )
    return getattr(transformers, name)


def check_pretrained(
    found: Pretrained, network: Any, setting: str, optional: tuple[str, ...] = (), **options: Any
) -> "torch.nn.Module":
    """Raise WeightsError unless the files can be read and hold as many values as the architecture needs.

    Only headers are read; `optional` parameters may be missing. Returns the network on the meta device, without
    weights. `options` are the network's own.
    """
    import torch

    from cliper.model.loading.tensors import sizes_in

    try:
        settings = network.config_class.from_pretrained(found.folder)
        with torch.device("meta"):
            empty: torch.nn.Module = network(settings, **options)
    except Exception as error:  # transformers raises many types for wrong values
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{setting}: {found.folder / 'config.json'} is not usable: {reason}") from error
    held = sum(sizes_in(found.weights).values())
    needed = sum(p.numel() for name, p in empty.named_parameters() if name not in optional)
    if held < needed:
        raise WeightsError(
            f"{setting}: {found.weights[0]} holds {held:,} values, and {network.__name__} needs {needed:,}: it is "
            "of another model, or incomplete"
        )
    return empty


def load_pretrained(
    found: Pretrained,
    network: Any,
    setting: str,
    dtype: "torch.dtype",
    optional: tuple[str, ...] = (),
    **options: Any,
) -> "torch.nn.Module":
    """Load the network onto the CPU, in evaluation mode.

    `optional` tensors may be missing. Raises WeightsError if others are, or do not fit.
    """
    try:
        model, report = network.from_pretrained(
            found.folder, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{setting}: cannot load {found.folder}: {reason}") from error
    wrong = [
        *(f"no tensor '{name}'" for name in sorted(report["missing_keys"]) if name not in optional),
        *(f"'{entry[0]}' has another shape" for entry in sorted(report["mismatched_keys"])),
    ]
    if wrong:
        raise WeightsError(f"{setting}: {found.folder} does not fit {network.__name__}: {wrong[0]}")
    loaded: torch.nn.Module = model.eval().requires_grad_(False)
    return loaded


def load_tokenizer(found: Pretrained, setting: str) -> Any:
    """The tokenizer in a model's folder. Raises WeightsError."""
    from cliper.model._libraries import transformers

    if not TOKENIZERS & {path.name for path in found.files}:  # transformers would make an empty one
        names = ", ".join(sorted(TOKENIZERS))
        raise WeightsError(f"{setting}: {found.folder} has no tokenizer; expected one of {names}")
    try:
        return transformers.AutoTokenizer.from_pretrained(found.folder, local_files_only=True)
    except Exception as error:  # transformers raises many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{setting}: the tokenizer in {found.folder} cannot be read: {reason}") from error


def hash_of(found: Pretrained) -> str:
    """SHA-256 over the files of a model."""
    return sha256_of(found.files)
