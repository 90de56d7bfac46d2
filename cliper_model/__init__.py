"""CLIPer: training-free open-vocabulary semantic segmentation (Sun et al., ICCV 2025), batched and deterministic.

Names are resolved when they are first used, so that configs and class lists can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig
from cliper.model.errors import ClassListError, CliperError, ConfigError, WeightsError

if TYPE_CHECKING:
    from cliper.model.labels import Segmentation
    from cliper.model.segmenter import CLIPer

_NEEDS_TORCH = {"CLIPer": "cliper.model.segmenter", "Segmentation": "cliper.model.labels"}

__all__ = [
    "CLIPer",
    "CLIPerConfig",
    "ClassList",
    "ClassListError",
    "CliperError",
    "ConfigError",
    "Segmentation",
    "WeightsError",
]


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'cliper_model' has no attribute '{name}'")
    return getattr(import_module(_NEEDS_TORCH[name]), name)
