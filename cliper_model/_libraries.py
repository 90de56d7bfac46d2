"""open_clip, diffusers and transformers, importable with any torchvision. Import them from here.

A torchvision wheel built for CUDA fails to import with a CPU build of torch: its compiled operators
do not load, and its Python code then registers shape functions for operators that do not
exist (``operator torchvision::nms does not exist``). open_clip, transformers and diffusers import
torchvision at their top, so all three would fail although none of the operators is ever called here.

Declaring the two missing schemas fixes the import. If torchvision works (its operators are
registered when it loads), nothing is declared.
"""

import importlib.util

import torch

# Schemas as torchvision declares them (torchvision/csrc/ops/nms.cpp and quantized/cpu/qnms_kernel.cpp).
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _needs_schemas() -> bool:
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        return "torchvision::nms" in str(error)
    return False


# Kept until the process ends: the schemas are removed with the Library object.
_LIBRARY = torch.library.Library("torchvision", "DEF") if _needs_schemas() else None
if _LIBRARY is not None:
    for _schema in _SCHEMAS.values():
        _LIBRARY.define(_schema)

import diffusers  # noqa: E402  (after the schemas)
import open_clip  # noqa: E402
import transformers  # noqa: E402

from cliper.model.loading.hub import downloads_as_before  # noqa: E402

with downloads_as_before():
    transformers.utils.logging.disable_progress_bar()  # no progress output for two small files
    diffusers.utils.logging.disable_progress_bar()

__all__ = ["diffusers", "open_clip", "transformers"]
