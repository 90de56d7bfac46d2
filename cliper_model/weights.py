"""Find weights: from a setting to files on this machine, and to the hash that identifies them.

Nothing is downloaded at import. Hub names are fetched into the hub's own cache the first time they are
resolved; folders and files are used where they are. The driver resolves before any worker starts, so a
missing file is one clear message.
"""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

from cliper.model.config import BackboneConfig, FGCConfig
from cliper.model.errors import WeightsError

EMBEDDED = {"tiny": Path(__file__).parent / "weights" / "tiny"}

# What FGC reads from a Stable Diffusion repository: no VAE decoder-only, safety-checker or .bin duplicates.
_DIFFUSION_FILES = [
    "scheduler/*",
    "tokenizer/*",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
_DIFFUSION_PARTS = ("scheduler", "tokenizer", "text_encoder", "unet", "vae")


@dataclass(frozen=True)
class Backbone:
    """A resolved backbone: the name for open_clip, and the checkpoint file (None: it is inside a local-dir)."""

    name: str
    checkpoint: Path | None
    openai: bool

    @property
    def files(self) -> list[Path]:
        """Every file that decides what the backbone computes."""
        if self.checkpoint is not None:
            return [self.checkpoint]
        return sorted(p for p in Path(self.name.removeprefix("local-dir:")).iterdir() if p.is_file())


def resolve_backbone(config: BackboneConfig) -> Backbone:
    """Locate the backbone's files, downloading an open_clip tag or hub name if it is not in the cache.

    Raises WeightsError for an unknown architecture, an unknown tag, a missing file, a QuickGELU mismatch,
    or a download that failed.
    """
    schema, _, rest = config.model.partition(":")
    if schema == "embedded":
        return Backbone(f"local-dir:{_embedded(rest, 'clip')}", None, openai=False)
    if schema == "local-dir":
        return Backbone(f"local-dir:{_local_clip(Path(rest))}", None, openai=False)
    if schema == "hf-hub":
        return Backbone(f"local-dir:{_snapshot(rest, None, ['open_clip*'])}", None, openai=False)
    return _resolve_open_clip(config.model, config.weights or "")


def _embedded(name: str, part: str) -> Path:
    if name not in EMBEDDED:
        raise WeightsError(f"no embedded model '{name}'; there is: {', '.join(sorted(EMBEDDED))}")
    return EMBEDDED[name] / part


def _local_clip(folder: Path) -> Path:
    if not (folder / "open_clip_config.json").is_file():
        raise WeightsError(f"{folder} has no open_clip_config.json; expected it and a .safetensors beside it")
    return folder


def _resolve_open_clip(architecture: str, weights: str) -> Backbone:
    from cliper.model._libraries import open_clip

    known = open_clip.list_models()
    if architecture not in known:
        close = (
            ", ".join(m for m in known if m.split("-")[:2] == architecture.split("-")[:2]) or "ViT-B-16, ViT-L-14"
        )
        raise WeightsError(f"unknown backbone.model '{architecture}'; similar names in open_clip: {close}")
    quick_gelu = bool((open_clip.get_model_config(architecture) or {}).get("quick_gelu", False))
    path = Path(weights)
    if path.is_file():
        openai = _is_torchscript(path)
        _check_gelu(architecture, f"{weights} (an OpenAI archive)", quick_gelu, needed=True if openai else None)
        return Backbone(architecture, path, openai)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in tags:
        raise WeightsError(
            f"backbone.weights '{weights}' is neither a file nor a tag of {architecture}; "
            f"tags: {', '.join(tags) or 'none'}"
        )
    tag = open_clip.get_pretrained_cfg(architecture, weights)
    _check_gelu(architecture, f"'{weights}'", quick_gelu, needed=bool(tag.get("quick_gelu", False)))
    return Backbone(architecture, _download(tag, f"{architecture}/{weights}"), openai=False)


def _check_gelu(architecture: str, weights: str, has: bool, needed: bool | None) -> None:
    """Refuse weights trained with the other activation: they load without a word and segment badly."""
    if needed is None or needed == has:
        return
    base = architecture.removesuffix("-quickgelu")
    right = f"{base}-quickgelu" if needed else base
    raise WeightsError(
        f"weights {weights} were trained with quick_gelu={needed}, but {architecture} has quick_gelu={has}; "
        f"set backbone.model to '{right}'"
    )


def _is_torchscript(path: Path) -> bool:
    """Return whether a checkpoint is a TorchScript archive, the form OpenAI released CLIP in."""
    import zipfile

    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist())


def _download(tag: dict[str, object], what: str) -> Path:
    from cliper.model._libraries import open_clip

    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # the hub client raises many types for "no network" and "not there"
        raise WeightsError(_unreachable(what, error)) from error


def _unreachable(what: str, error: Exception) -> str:
    return (
        f"weights '{what}' are not on this machine and could not be downloaded ({type(error).__name__}); "
        "connect to the network once, or give a local path"
    )


def resolve_diffusion(config: FGCConfig) -> Path:
    """Return the diffusers folder, downloading what FGC needs of a hub id if it is not in the cache.

    Raises WeightsError for an incomplete folder or a download that failed.
    """
    if config.model.startswith("embedded:"):
        folder = _embedded(config.model.removeprefix("embedded:"), "sd")
    elif Path(config.model).is_dir():
        folder = Path(config.model)
    elif config.model.startswith((".", "/", "~")):
        raise WeightsError(f"fgc.model '{config.model}' is not a folder on this machine")
    else:
        folder = _snapshot(config.model, config.revision, _DIFFUSION_FILES)
    missing = [part for part in _DIFFUSION_PARTS if not (folder / part).is_dir()]
    if missing:
        raise WeightsError(f"{folder} is not a complete diffusers folder: {', '.join(missing)} missing")
    return folder


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types for "no network" and "not there"
        raise WeightsError(_unreachable(repository, error)) from error


def sha256_of(files: list[Path]) -> str:
    """Return one hash over names and contents of `files` (hex, 64 characters)."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as handle:
            total.update(path.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def diffusion_files(folder: Path) -> list[Path]:
    """Every file of a diffusers folder that decides what FGC computes."""
    return sorted(p for part in _DIFFUSION_PARTS for p in (folder / part).rglob("*") if p.is_file())
