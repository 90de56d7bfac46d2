"""CLIPer: training-free open-vocabulary semantic segmentation (Sun et al., ICCV 2025), batched and deterministic.

Names are resolved on first use, so that configs and class lists can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cliper.model.classes import ClassList
    from cliper.model.config import CLIPerConfig
    from cliper.model.errors import ClassListError, CliperError, ConfigError, WeightsError
    from cliper.model.labels import Segmentation
    from cliper.model.segmenter import CLIPer

_HOMES = {
    "CLIPer": "segmenter",
    "CLIPerConfig": "config",
    "ClassList": "classes",
    "ClassListError": "errors",
    "CliperError": "errors",
    "ConfigError": "errors",
    "Segmentation": "labels",
    "WeightsError": "errors",
}

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
    if name not in _HOMES:
        raise AttributeError(f"module 'cliper.model' has no attribute '{name}'")
    return getattr(import_module(f"cliper.model.{_HOMES[name]}"), name)
