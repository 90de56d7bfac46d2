"""Names and sizes of the tensors in a checkpoint, read from its header without loading it."""

import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from cliper.model.errors import WeightsError

Sizes = Mapping[str, int]  # elements of every tensor, by its name


def sizes_in(files: Iterable[Path]) -> dict[str, int]:
    """The tensors of a checkpoint, in one file or in shards. Raises WeightsError if a file cannot be read."""
    found: dict[str, int] = {}
    for path in files:
        try:
            found |= _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)
        except Exception as error:  # torch and safetensors raise many types for a broken file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise WeightsError(
                f"{path} cannot be read ({path.stat().st_size} bytes; {reason[:160]}): it is truncated or not a "
                "checkpoint; remove it and run the same command again, or copy it again"
            ) from error
    return found


def _safetensors(path: Path) -> dict[str, int]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        return {name: _count(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118


def _pickle(path: Path) -> dict[str, int]:
    """Read a state dict, alone or below "state_dict", or a TorchScript archive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if zipfile.is_zipfile(path) and _is_script(zipfile.ZipFile(path)):
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="meta", mmap=zipfile.is_zipfile(path), weights_only=True)
    state = state.get("state_dict", state)
    return {name: value.numel() for name, value in state.items() if isinstance(value, torch.Tensor)}


def _is_script(archive: zipfile.ZipFile) -> bool:
    return any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist())


def _count(shape: Iterable[int]) -> int:
    return int(torch.Size(shape).numel())


def require(wanted: Sizes, found: Sizes, place: str, what: str = "its configuration") -> None:
    """Raise WeightsError if a tensor of `wanted` is missing in `found`, or has another size there."""
    for name, size in wanted.items():
        if name not in found:
            raise WeightsError(f"{place} does not fit {what}: it has no tensor '{name}'")
        if found[name] != size:
            raise WeightsError(f"{place} does not fit {what}: '{name}' has {found[name]} values, not {size}")
