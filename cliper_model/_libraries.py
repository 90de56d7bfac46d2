"""open_clip, diffusers and transformers, importable beside any torchvision. Import them from here.

A torchvision wheel built for CUDA refuses to import beside a CPU build of torch: its compiled
operators do not load, and its Python half then registers shape functions for operators that do not
exist (``operator torchvision::nms does not exist``). open_clip, transformers and diffusers import
torchvision at their top, so all three would fail although none of the operators is ever called here.

Declaring the two missing schemas cures the import. Where torchvision is healthy (its operators are
registered as it loads) nothing is declared.
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


# Kept for the life of the process: the schemas vanish with the Library object.
_LIBRARY = torch.library.Library("torchvision", "DEF") if _needs_schemas() else None
if _LIBRARY is not None:
    for _schema in _SCHEMAS.values():
        _LIBRARY.define(_schema)

import diffusers  # noqa: E402  (after the schemas)
import open_clip  # noqa: E402
import transformers  # noqa: E402

from cliper.model.hub import downloads_as_before  # noqa: E402

with downloads_as_before():
    transformers.utils.logging.disable_progress_bar()  # loading two small files is no news
    diffusers.utils.logging.disable_progress_bar()

__all__ = ["diffusers", "open_clip", "transformers"]
