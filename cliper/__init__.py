"""Label image corpora of any size with open-vocabulary semantic masks.

The names below are public. Each is loaded on first use: `import cliper` imports neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cliper.model.classes import ClassList as ClassList
    from cliper.model.config import CLIPerConfig as CLIPerConfig
    from cliper.model.errors import CliperError as CliperError
    from cliper.model.segmentation import Segmentation as Segmentation
    from cliper.pipeline.config import JobConfig as JobConfig
    from cliper.pipeline.config import load_classes as load_classes
    from cliper.pipeline.config import load_config as load_config
    from cliper.pipeline.dataset import MaskDataset as MaskDataset
    from cliper.pipeline.export.registry import EXPORTERS as EXPORTERS
    from cliper.pipeline.label.segmenters import SEGMENTERS as SEGMENTERS
    from cliper.pipeline.predict.model import CLIPer as CLIPer
    from cliper.pipeline.predict.prediction import Prediction as Prediction
    from cliper.pipeline.report.images import overlay as overlay
    from cliper.pipeline.results import OpenedRun as OpenedRun
    from cliper.pipeline.results import open_run as open_run
    from cliper.pipeline.run.masks import MASK_CODECS as MASK_CODECS
    from cliper.pipeline.run.masks import unpack_mask as unpack_mask
    from cliper.pipeline.storage.backend import Storage as Storage

_HOMES = {
    "CLIPer": "cliper.pipeline.predict.model",
    "CLIPerConfig": "cliper.model.config",
    "ClassList": "cliper.model.classes",
    "CliperError": "cliper.model.errors",
    "EXPORTERS": "cliper.pipeline.export.registry",
    "JobConfig": "cliper.pipeline.config",
    "MASK_CODECS": "cliper.pipeline.run.masks",
    "MaskDataset": "cliper.pipeline.dataset",
    "OpenedRun": "cliper.pipeline.results",
    "Prediction": "cliper.pipeline.predict.prediction",
    "SEGMENTERS": "cliper.pipeline.label.segmenters",
    "Segmentation": "cliper.model.segmentation",
    "Storage": "cliper.pipeline.storage.backend",
    "load_classes": "cliper.pipeline.config",
    "load_config": "cliper.pipeline.config",
    "open_run": "cliper.pipeline.results",
    "overlay": "cliper.pipeline.report.images",
    "unpack_mask": "cliper.pipeline.run.masks",
}

__all__ = [
    "EXPORTERS",
    "MASK_CODECS",
    "SEGMENTERS",
    "CLIPer",
    "CLIPerConfig",
    "ClassList",
    "CliperError",
    "JobConfig",
    "MaskDataset",
    "OpenedRun",
    "Prediction",
    "Segmentation",
    "Storage",
    "__version__",
    "load_classes",
    "load_config",
    "open_run",
    "overlay",
    "unpack_mask",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("cliper")
    if name not in _HOMES:
        raise AttributeError(f"module 'cliper' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
