"""Find weights: from a setting to files on this machine, and to the hash that identifies them.

Nothing is downloaded at import. Hub names are fetched into the hub's own cache when they are first
resolved; local folders and files are used in place. The driver resolves weights before any worker starts,
so that a missing file is reported in one message.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cliper.model.config import BackboneConfig, CLIPerConfig, FGCConfig
from cliper.model.errors import WeightsError
from cliper.model.loading.choose import (
    Network,
    choose_clip_file,
    choose_clip_folder,
    choose_diffusion,
    choose_network,
    choose_tiny_vae,
)
from cliper.model.loading.files import read_json, sha256_of
from cliper.model.loading.hub import Choose, fetch, names_in
from cliper.model.loading.pretrained import resolve_pretrained

__all__ = ["Backbone", "Diffusion", "pin", "resolve_backbone", "resolve_diffusion", "sha256_of"]

# Repositories of the open_clip tags in configs/label/. Importing open_clip, which lists them, takes seconds; with
# these a missing checkpoint is reported before that.
HUB_TAGS = {
    ("ViT-B-16-quickgelu", "openai"): "timm/vit_base_patch16_clip_224.openai",
    ("ViT-L-14-quickgelu", "openai"): "timm/vit_large_patch14_clip_224.openai",
    ("ViT-H-14", "laion2b_s32b_b79k"): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}
EMBEDDED = {"tiny": Path(__file__).parent.parent / "weights" / "tiny"}


@dataclass(frozen=True)
class Backbone:
    """A resolved backbone: the name for open_clip, its files, and the hub's commit if they come from the hub."""

    name: str
    checkpoint: Path
    openai: bool
    files: tuple[Path, ...]  # every file that affects the backbone's output
    commit: str | None = None


@dataclass(frozen=True)
class Diffusion:
    """A resolved Stable Diffusion: a diffusers folder, and the hub's commit if it comes from the hub.

    `vae`: the folder of the AutoencoderTiny that replaces its VAE, and that one's commit.
    """

    folder: Path
    commit: str | None = None
    vae: Path | None = None
    vae_commit: str | None = None

    def network(self, part: str) -> Network:
        """The files of a network ("unet", "vae", "text_encoder"). Raises WeightsError."""
        found = choose_network(names_in(self.folder), part)
        if isinstance(found, str):
            raise WeightsError(f"{self.folder}: missing: {found}")
        return found

    @property
    def files(self) -> tuple[Path, ...]:
        """Exactly the files that affect FGC's output."""
        own = [self.folder / name for name in sorted(choose_diffusion(names_in(self.folder)))]
        if self.vae is not None:
            own += [self.vae / name for name in choose_tiny_vae(names_in(self.vae))]
        return tuple(own)


def resolve_backbone(config: BackboneConfig) -> Backbone:
    """Locate the backbone's files, downloading an open_clip tag or hub name if it is not in the cache.

    Raises WeightsError for an unknown architecture, an unknown tag, a missing file, a QuickGELU mismatch,
    or a download that failed.
    """
    schema, _, rest = config.model.partition(":")
    if schema == "embedded":
        return _clip_folder(_embedded(rest, "clip"))
    if schema == "local-dir":
        return _clip_folder(Path(rest))
    if schema == "hf-hub":
        folder = fetch(rest, config.revision, _named(config.model, choose_clip_folder))
        return _clip_folder(folder, folder.name)
    return _resolve_open_clip(config)


def _embedded(name: str, part: str) -> Path:
    if name not in EMBEDDED:
        raise WeightsError(f"no embedded model '{name}'; there is: {', '.join(sorted(EMBEDDED))}")
    return EMBEDDED[name] / part


def _clip_folder(folder: Path, commit: str | None = None) -> Backbone:
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder on this machine")
    config, checkpoint, *tokenizer = _named(str(folder), choose_clip_folder)(names_in(folder))
    text = read_json(folder / config).get("model_cfg", {}).get("text_cfg", {})
    loaded = [config, checkpoint, *(tokenizer if "hf_tokenizer_name" in text else [])]
    files = tuple(folder / name for name in sorted(loaded))
    return Backbone(f"local-dir:{folder}", folder / checkpoint, False, files, commit)


def _named(place: str, choose: Choose) -> Choose:
    """Wrap `choose` so that its errors start with the place of the missing files."""

    def named(names: Collection[str]) -> list[str]:
        try:
            return list(choose(names))
        except WeightsError as error:
            raise WeightsError(f"{place}: {error}") from error

    return named


def _resolve_open_clip(config: BackboneConfig) -> Backbone:
    from cliper.model._libraries import open_clip

    architecture, weights = config.model, config.weights or ""
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
        return Backbone(architecture, path, openai, (path,))
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in tags:
        raise WeightsError(
            f"backbone.weights '{weights}' is neither a file nor a tag of {architecture}; "
            f"tags: {', '.join(tags) or 'none'}"
        )
    tag = open_clip.get_pretrained_cfg(architecture, weights)
    _check_gelu(architecture, f"'{weights}'", quick_gelu, needed=bool(tag.get("quick_gelu", False)))
    return _resolve_tag(architecture, weights, tag, config.revision)


def _resolve_tag(architecture: str, weights: str, tag: dict[str, str], revision: str | None) -> Backbone:
    """The checkpoint of an open_clip tag: OWNER/NAME/FILE or OWNER/NAME/ on the hub."""
    repository, _, filename = tag.get("hf_hub", "").rpartition("/")
    if not repository:
        raise WeightsError(
            f"'{weights}' of {architecture} is not on the hub; download {tag.get('url')} and give the file as "
            "backbone.weights"
        )
    folder, name = _fetch_tag(architecture, weights, repository, filename, revision)
    return Backbone(architecture, folder / name, False, (folder / name,), folder.name)


def _fetch_tag(
    architecture: str, weights: str, repository: str, filename: str, revision: str | None
) -> tuple[Path, str]:
    """The folder of a tag's repository, and the name of the checkpoint in it."""
    choose = _named(f"{architecture}/{weights} ({repository})", partial(choose_clip_file, filename=filename))
    folder = fetch(repository, revision, choose)
    [name] = choose(names_in(folder))
    return folder, name


def _check_gelu(architecture: str, weights: str, has: bool, needed: bool | None) -> None:
    """Refuse weights trained with the other activation: they load silently and produce poor masks."""
    if needed is None or needed == has:
        return
    base = architecture.removesuffix("-quickgelu")
    right = f"{base}-quickgelu" if needed else base
    raise WeightsError(
        f"weights {weights} were trained with quick_gelu={needed}, but {architecture} has quick_gelu={has}; "
        f"set backbone.model to '{right}'"
    )


def _is_torchscript(path: Path) -> bool:
    """Whether a checkpoint is a TorchScript archive, OpenAI's release format of CLIP."""
    import zipfile

    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist())


def resolve_diffusion(config: FGCConfig) -> Diffusion:
    """Return the diffusers folder, downloading FGC's files of a hub id if they are not in the cache.

    Raises WeightsError for an incomplete folder or a download that failed.
    """
    found = _resolve_diffusers(config)
    if config.vae is None:
        return found
    choose = _named(f"fgc.vae '{config.vae}'", choose_tiny_vae)
    if Path(config.vae).is_dir():
        choose(names_in(Path(config.vae)))
        return replace(found, vae=Path(config.vae))
    folder = fetch(config.vae, config.vae_revision, choose)
    return replace(found, vae=folder, vae_commit=folder.name)


def _resolve_diffusers(config: FGCConfig) -> Diffusion:
    choose = _named(config.model, choose_diffusion)
    if config.model.startswith("embedded:"):
        return Diffusion(_embedded(config.model.removeprefix("embedded:"), "sd"))
    if Path(config.model).is_dir():
        choose(names_in(Path(config.model)))
        return Diffusion(Path(config.model))
    if config.model.startswith((".", "/", "~")):
        raise WeightsError(f"fgc.model '{config.model}' is not a folder on this machine")
    folder = fetch(config.model, config.revision, choose)
    return Diffusion(folder, folder.name)


def pin(config: CLIPerConfig) -> CLIPerConfig:
    """The same configuration with every hub revision replaced by its current commit.

    Files that are not in the cache are downloaded. Raises WeightsError.
    """
    backbone, fgc, dino = config.backbone, config.fgc, config.dino
    if fgc is not None:
        found = resolve_diffusion(fgc)
        commits = {"revision": found.commit, "vae_revision": found.vae_commit}
        fgc = fgc.model_copy(update={name: commit for name, commit in commits.items() if commit is not None})
    if dino is not None and (commit := resolve_pretrained(dino.model, dino.revision, "dino.model").commit):
        dino = dino.model_copy(update={"revision": commit})
    if (commit := _commit_of(backbone)) is not None:
        backbone = backbone.model_copy(update={"revision": commit})
    return config.model_copy(update={"backbone": backbone, "fgc": fgc, "dino": dino})


def _commit_of(config: BackboneConfig) -> str | None:
    """`resolve_backbone(config).commit`, without importing open_clip for a tag of HUB_TAGS."""
    tag = (config.model, config.weights or "")
    if tag not in HUB_TAGS or Path(tag[1]).exists():
        return resolve_backbone(config).commit
    folder, _ = _fetch_tag(*tag, HUB_TAGS[tag], "", config.revision)
    return folder.name
