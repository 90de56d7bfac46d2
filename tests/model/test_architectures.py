"""Every architecture of open_clip: the fusion reads it, or it is refused with the reason."""

import pytest
import torch

from cliper.model._libraries import open_clip
from cliper.model.backbone import _check_plain_vit
from cliper.model.config import FusionConfig
from cliper.model.fusion import coarse_scores
from cliper.model.loading.check import unsupported

TEXT = {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 2, "layers": 1}
SMALL = {"layers": 2, "width": 64, "head_width": 32}


def tower(name: str) -> torch.nn.Module:
    """The architecture with two narrow layers and its own options: norms, patches, pooling."""
    settings = open_clip.get_model_config(name)
    vision = settings["vision_cfg"] | SMALL | {"image_size": 2 * settings["vision_cfg"]["patch_size"]}
    model = open_clip.CLIP(16, vision, TEXT, quick_gelu=settings.get("quick_gelu", False)).eval()
    open_clip.model.set_model_preprocess_cfg(model, {"mean": (0.5,) * 3, "std": (0.5,) * 3})
    return model


@pytest.mark.parametrize("name", open_clip.list_models())
@torch.inference_mode()
def test_architectures_work_or_are_refused(name: str) -> None:
    reason = unsupported(open_clip.get_model_config(name))
    if reason is not None:
        assert reason.startswith(("its tower is ", "it pools by attention"))
        return
    model = tower(name)
    _check_plain_vit(model, name)
    patch = model.visual.patch_size[0]
    text = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1)
    scores = coarse_scores(model.visual, torch.randn(1, 3, 2 * patch, 3 * patch), text, 3, FusionConfig(), None)
    assert scores.shape == (1, 3, 2, 3)
    assert scores.isfinite().all()


def test_the_families_of_today() -> None:
    works = {name for name in open_clip.list_models() if unsupported(open_clip.get_model_config(name)) is None}
    # OpenAI, DFN and MetaCLIP
    assert {"ViT-L-14-336", "ViT-H-14-378-quickgelu", "ViT-H-14-worldwide"} <= works
    assert not {"ViT-B-16-SigLIP2", "EVA02-L-14", "PE-Core-L-14-336", "MobileCLIP2-S0", "coca_ViT-L-14"} & works
