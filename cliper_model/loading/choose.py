"""Select the weight files of a repository or folder by their names alone, before any file is loaded.

The same rules apply to a folder, the hub's cache and the hub. Of several forms of the same network, the first in
FORMS is used: safetensors before pickles, full precision before half.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cliper.model.errors import WeightsError

# Networks by their folder in a repository, with the stem of their file names; "model" stands for the top folder.
NETWORKS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "model": "model",
    "tiny_vae": "diffusion_pytorch_model",
}
FGC_NETWORKS = ("unet", "vae", "text_encoder")
_PICKLED = {"model": "pytorch_model"}  # transformers has another name for its pickles
_INDEX_FIRST = ("unet", "vae")  # with both, diffusers loads the shards, transformers the whole file
FORMS = [("safetensors", None), ("safetensors", "fp16"), ("bin", None), ("bin", "fp16")]

_SCHEDULER = "scheduler/scheduler_config.json"
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")

CLIP_CONFIG = "open_clip_config.json"
# The order in which open_clip searches a folder for a checkpoint.
CLIP_CHECKPOINTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    *("open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)
_CLIP_TOKENIZER = (*_TOKENIZER, "added_tokens.json", "sentencepiece.bpe.model", "spiece.model")
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")


@dataclass(frozen=True)
class Network:
    """The files of one network: its config, an index if it is sharded, and its weights."""

    part: str
    suffix: str  # "safetensors" or "bin"
    variant: str | None  # "fp16" or None
    index: str | None
    weights: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        """All files, relative to the repository."""
        return [f"{self.part}/config.json", *([self.index] if self.index else []), *self.weights]


def choose_diffusion(names: Collection[str]) -> list[str]:
    """The files among `names` that FGC loads. Raises WeightsError, which names the missing files."""
    missing = [_SCHEDULER] if _SCHEDULER not in names else []
    tokenizer = [f"tokenizer/{name}" for name in _TOKENIZER if f"tokenizer/{name}" in names]
    if not {"tokenizer/tokenizer.json", "tokenizer/vocab.json"} & set(tokenizer):
        missing.append("tokenizer/tokenizer.json (or vocab.json with merges.txt)")
    elif "tokenizer/tokenizer.json" not in tokenizer and "tokenizer/merges.txt" not in tokenizer:
        missing.append("tokenizer/merges.txt")
    networks = []
    for part in FGC_NETWORKS:
        found = choose_network(names, part)
        if f"{part}/config.json" not in names:
            missing.append(f"{part}/config.json")
        if isinstance(found, str):
            missing.append(found)
        else:
            networks.append(found)
    if missing:
        raise WeightsError(f"missing: {', '.join(missing)}{_hint(names)}")
    return [_SCHEDULER, *tokenizer, *(name for network in networks for name in network.files)]


def _hint(names: Collection[str]) -> str:
    if any(name.startswith("transformer/") for name in names):
        return "; it holds a transformer, not the UNet of Stable Diffusion 1.x or 2.x that FGC reads"
    single = [name for name in names if "/" not in name and name.endswith((".safetensors", ".ckpt"))]
    if single and not any(name.startswith("unet/") for name in names):
        return f"; it holds one file for everything ({single[0]}), FGC needs the diffusers layout"
    return ""


def choose_pretrained(names: Collection[str]) -> list[str]:
    """The files among `names` that transformers loads. Raises WeightsError, which names the missing ones."""
    inside = {f"model/{name}" for name in names if "/" not in name}
    if "model/config.json" not in inside:
        held = f" (it holds {', '.join(sorted(names)[:6])})" if names else ""
        raise WeightsError(f"missing: config.json{held}")
    found = choose_network(inside, "model")
    if isinstance(found, str):
        raise WeightsError(f"missing: {found.removeprefix('model/')}")
    others = [name for name in (*_CLIP_TOKENIZER, *PROCESSOR) if f"model/{name}" in inside]
    return sorted({*(name.removeprefix("model/") for name in found.files), *others})


def choose_tiny_vae(names: Collection[str]) -> list[str]:
    """The files among `names` of an AutoencoderTiny. Raises WeightsError, which names the missing ones."""
    found = choose_network({f"tiny_vae/{name}" for name in names if "/" not in name}, "tiny_vae")
    missing = ["config.json"] if "config.json" not in names else []
    if isinstance(found, str):
        missing.append(found.removeprefix("tiny_vae/"))
    if missing or isinstance(found, str):
        raise WeightsError(f"missing: {', '.join(missing)}")
    return sorted(name.removeprefix("tiny_vae/") for name in found.files)


def choose_network(names: Collection[str], part: str) -> Network | str:
    """The best complete form of a network's weights among `names`, or the name of a missing file."""
    for suffix, variant in FORMS:
        stem = f"{part}/{NETWORKS[part] if suffix == 'safetensors' else _pickled(NETWORKS[part])}"
        ending = f".{variant}" if variant else ""
        whole, index = f"{stem}{ending}.{suffix}", f"{stem}.{suffix}.index{ending}.json"
        sharded = index in names and (whole not in names or part in _INDEX_FIRST)
        if sharded:
            shards, absent = _shards(names, stem, ending, suffix)
            return absent or Network(part, suffix, variant, index, shards)
        if whole in names:
            return Network(part, suffix, variant, None, (whole,))
    return f"{part}/{NETWORKS[part]}.safetensors"


def _pickled(stem: str) -> str:
    return _PICKLED.get(stem, stem)


def _shards(names: Collection[str], stem: str, ending: str, suffix: str) -> tuple[tuple[str, ...], str]:
    """The shards STEM-00001-of-00003 among `names`, and the first that is missing ("" if none is)."""
    variant = re.escape(ending)
    pattern = re.compile(rf"{re.escape(stem)}(?:{variant})?-(\d+)-of-(\d+)(?:{variant})?\.{suffix}")
    found = {int(m[1]): (name, int(m[2])) for name in names if (m := pattern.fullmatch(name)) and ending in name}
    if not found:
        return (), f"{stem}-00001-of-...{ending}.{suffix}, which the index names"
    total = max(count for _, count in found.values())
    absent = next((number for number in range(1, total + 1) if number not in found), None)
    if absent is not None:
        return (), f"{stem}-{absent:05d}-of-{total:05d}{ending}.{suffix}"
    return tuple(found[number][0] for number in range(1, total + 1)), ""


def choose_clip_folder(names: Collection[str]) -> list[str]:
    """Config, checkpoint and tokenizer of an open_clip folder or repository. Raises WeightsError."""
    top = [name for name in names if "/" not in name]
    if CLIP_CONFIG not in top:
        listed = ", ".join(sorted(top)[:6]) or "nothing"
        raise WeightsError(f"no {CLIP_CONFIG}: not a model for open_clip (it holds {listed})")
    checkpoint = clip_checkpoint(top)
    if checkpoint is None:
        raise WeightsError(f"no weights beside {CLIP_CONFIG}: expected e.g. {CLIP_CHECKPOINTS[0]}")
    return [CLIP_CONFIG, checkpoint, *(name for name in _CLIP_TOKENIZER if name in top)]


def clip_checkpoint(names: Sequence[str]) -> str | None:
    """The checkpoint that open_clip loads from a folder with these files."""
    for preferred in CLIP_CHECKPOINTS:
        if preferred in names:
            return preferred
    for suffix in (".safetensors", ".bin", ".pth"):
        others = sorted(name for name in names if name.endswith(suffix))
        if others:
            return others[0]
    return None


def choose_clip_file(names: Collection[str], filename: str) -> list[str]:
    """The checkpoint of an open_clip tag in a repository; "" is the default name. Raises WeightsError."""
    usual = filename or "open_clip_pytorch_model.bin"
    safe = "open_clip_model.safetensors" if not filename else f"{filename.rpartition('.')[0]}.safetensors"
    for name in (safe, usual):
        if name in names:
            return [name]
    raise WeightsError(f"missing: {safe} (or {usual})")
