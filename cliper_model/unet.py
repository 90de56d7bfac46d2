"""The UNet's attention modules, their order of execution and their sizes."""

from dataclasses import dataclass
from typing import Any

from cliper.model.config import FGCConfig
from cliper.model.errors import ConfigError


@dataclass(frozen=True)
class Attention:
    """An attention module of a UNet: "self" or "cross", at 1 / 2^`level` of the latents' side."""

    kind: str
    module: Any
    level: int


def attention_modules(unet: Any) -> list[Attention]:
    """The UNet's attention modules in the order they run: self-attention (attn1), then cross (attn2)."""
    deepest = len(unet.down_blocks) - 1
    blocks = [*enumerate(unet.down_blocks), (deepest, unet.mid_block)]
    blocks += [(deepest - place, block) for place, block in enumerate(unet.up_blocks)]
    found = []
    for level, block in blocks:
        for transformer in getattr(block, "attentions", None) or []:
            for layer in transformer.transformer_blocks:
                found += [Attention("self", layer.attn1, level), Attention("cross", layer.attn2, level)]
    return found


def wanted_layers(config: FGCConfig, modules: list[Attention]) -> tuple[int, ...]:
    """Positions of `config.layers` among the modules.

    Raises ConfigError for one that is out of range or cross-attention, or if they differ in size: their maps are
    multiplied with each other.
    """
    wanted = tuple(_position(layer, modules) for layer in config.layers)
    levels = [modules[index].level for index in wanted]
    if len(set(levels)) > 1:
        side = config.resolution // 8
        sizes = ", ".join(
            f"{layer}: {side >> level} x {side >> level}"
            for layer, level in zip(config.layers, levels, strict=True)
        )
        same = [str(i - len(modules)) for i, m in enumerate(modules) if m.kind == "self" and m.level == levels[0]]
        raise ConfigError(
            f"fgc.layers have different sizes ({sizes}); all must have one, e.g. those of {config.layers[0]}: "
            f"{', '.join(same)}"
        )
    return wanted


def _position(layer: int, modules: list[Attention]) -> int:
    count = len(modules)
    if not -count <= layer < count:
        raise ConfigError(f"fgc.layers: {layer} is out of range; this UNet has {count} attention modules")
    index = layer % count
    if modules[index].kind != "self":
        raise ConfigError(f"fgc.layers: {layer} is cross-attention; use {layer - 1}, the self-attention before it")
    return index
