"""Presets that trade quality for speed, as changes to a configuration. `exact` is the default."""

from typing import Any

from cliper.model.config import CLIPerConfig
from cliper.model.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    # The official computation.
    "exact": {},
    # Every layer shares the last Sinkhorn round, so that one product serves all; half precision.
    "fast": {"fusion": {"sinkhorn": "converged"}, "dtype": "bfloat16"},
    # The same, and FGC on a smaller image; the maps have 48 x 48 and 32 x 32 patches instead of 64 x 64.
    "fast-384": {"fusion": {"sinkhorn": "converged"}, "dtype": "bfloat16", "fgc": {"resolution": 384}},
    "fast-256": {"fusion": {"sinkhorn": "converged"}, "dtype": "bfloat16", "fgc": {"resolution": 256}},
    # No diffusion model: labels are computed from the coarse scores.
    "clip-only": {"fgc": None},
}


def preset(config: CLIPerConfig, name: str) -> CLIPerConfig:
    """Return `config` with the changes of PRESETS[name]. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'; there is: {', '.join(PRESETS)}")
    changes = {
        key: getattr(config, key).model_copy(update=value) if isinstance(value, dict) else value
        for key, value in PRESETS[name].items()
        if getattr(config, key) is not None  # a part that is off stays off
    }
    return config.model_copy(update=changes)
