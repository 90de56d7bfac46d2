"""Train the embedded CLIP on procedural scenes and their captions (no pixel labels).

    python -m tools.train_clip --output build/clip-0 --seed 0

Three losses, all from captions alone. (1) CLIP's contrastive loss between the images and captions of a batch.
(2) Multiple instance: patches are softmaxed over the class names, and every captioned class must have some of
them (the mean of its best ones is pushed to 1). (3) No patch may belong to a class the caption does not name.
The first phase applies (2) and (3) to the last block's value path, on small images. The second applies them to
early-layer fusion in every layer, at the model's own size, which also teaches the attention to stay within
objects; all layers share the converged Sinkhorn map there, half the time of one map each. Run again to resume; the
finished folder is an open_clip local-dir.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cliper.model._libraries import open_clip
from cliper.model.backbone import Vision, encode
from cliper.model.config import AttentionType, FusionConfig
from cliper.model.fusion import layer_logits
from tools import training
from tools.scenes import CLASSES, classes_in

IMAGE_SIDE = 160
STORED_SIDE = 192  # images are stored slightly larger than the model's input, for crops
VALUE_SIDE = 96  # the first phase uses small images: a third of the patches, a fifth of the time
MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "quick_gelu": False,
    "vision_cfg": {"image_size": IMAGE_SIDE, "layers": 6, "width": 160, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SMALLEST_CROP = 0.7  # share of the side a crop keeps at least
BEST = 0.04  # share of the patches a captioned class must win
PATCH_SCALE = 40.0  # temperature of the patches' class softmax
TEMPLATES = (
    "a photo of a {}.",
    "there is a {} in the scene.",
    "{}",
    "a {}",
    "a photo of {}.",
    "a small {}",
    "a large {}.",
)


def build_model() -> nn.Module:
    """Return an untrained CLIP of the embedded architecture."""
    model: nn.Module = open_clip.CLIP(**MODEL, output_dict=False)
    return model


def normalise(views: Tensor) -> Tensor:
    """CLIP's channel statistics on [B, 3, h, w] in [0, 1]."""
    mean, std = (torch.tensor(v, device=views.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (views - mean) / std


def picture_vectors(visual: Any, vision: Vision) -> Tensor:
    """Unit CLS vectors [B, C] from the last block run as CLIP does."""
    last = visual.transformer.resblocks[-1](vision.features[-1])  # [B, N, C]
    return F.normalize(visual.ln_post(last)[:, 0].float() @ visual.proj.float(), dim=-1)


def contrastive_loss(pictures: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit vectors [B, C] (Radford et al. 2021)."""
    logits = scale * pictures @ captions.T  # [B, B]
    target = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def instance_losses(logits: Tensor, named: Tensor, best: int) -> tuple[Tensor, Tensor]:
    """Multiple-instance losses of patch logits [L, B, K, P] and captioned classes, bool [B, K].

    First: -log of the mean probability of each captioned class's `best` patches. Second: -log of the
    probability each patch gives to captioned classes together.
    """
    shares = logits.softmax(dim=2)  # [L, B, K, P]
    peaks = shares.topk(best, dim=-1).values.mean(dim=-1)  # [L, B, K]
    found = -(peaks.clamp(min=1e-6).log() * named).sum(dim=-1) / named.sum(dim=-1)
    allowed = (shares * named[None, :, :, None]).sum(dim=2)  # [L, B, P]
    return found.mean(), -allowed.clamp(min=1e-6).log().mean()


class Captions:
    """Tokens of the captions and of every class name in every template, on the device."""

    def __init__(self, captions: list[str], device: torch.device) -> None:
        tokenizer = open_clip.SimpleTokenizer()
        self.tokens = torch.cat([tokenizer(captions[i : i + 1000]) for i in range(0, len(captions), 1000)]).to(
            device
        )
        self.named = torch.zeros(len(captions), len(CLASSES), dtype=torch.bool)
        for row, caption in enumerate(captions):
            self.named[row, classes_in(caption)] = True
        self.named = self.named.to(device)
        prompts = [tokenizer([template.format(name) for name in CLASSES]) for template in TEMPLATES]
        self.prompts = torch.stack(prompts).to(device)  # [T, K, 77]


@dataclass(frozen=True)
class Task:
    """A training phase: the attention and layers of the patch losses, the weight of the contrastive loss, and the
    side of the images in pixels."""

    attention: AttentionType
    first_layer: int
    contrast: float
    side: int


VALUE = Task("identity", -1, 1.0, VALUE_SIDE)  # the last layer's value path, patch by patch
FUSED = Task("fused", 0, 0.1, IMAGE_SIDE)  # every layer, by the attention that early-layer fusion uses


def loss_of_batch(
    model: Any, task: Task, views: Tensor, captions: "Captions", index: Tensor, prompts: Tensor
) -> Tensor:
    """The three losses of the scenes `index` [B] seen as `views` [B, 3, h, w], added up."""
    vision = encode(model.visual, normalise(views), "float32")
    sentences = F.normalize(model.encode_text(captions.tokens[index]).float(), dim=-1)
    classes = F.normalize(model.encode_text(prompts).float(), dim=-1)  # [K, C]
    scale = model.logit_scale.exp().clamp(max=100)
    contrast = contrastive_loss(picture_vectors(model.visual, vision), sentences, scale)
    side = views.shape[-1] // MODEL["vision_cfg"]["patch_size"]
    config = FusionConfig(attention=task.attention, logit_scale=PATCH_SCALE, sinkhorn="converged")
    seen = Vision(vision.features[task.first_layer :], vision.attention)
    dense = layer_logits(model.visual, seen, classes, config, (side, side)).logits.flatten(3)  # [L, B, K, P]
    found, allowed = instance_losses(dense.float(), captions.named[index], int(BEST * side * side))
    return task.contrast * contrast + found + allowed


def train(args: argparse.Namespace) -> None:
    """Train both phases, resuming from the checkpoints in `args.output` if there are any, and export."""
    device, began = training.pick_device(args.device, args.threads), time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    images, texts = training.load_scenes(args.scenes, args.cache, args.workers)
    images, captions = training.shrink(images.to(device), STORED_SIDE), Captions(texts, device)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = build_model().to(device).train()

    def loss_for(task: Task) -> Any:
        def loss_of(index: Tensor, _: int) -> Tensor:
            prompts = captions.prompts[int(torch.randint(len(TEMPLATES), (1,), generator=generator))]
            views = training.random_views(images[index], task.side, SMALLEST_CROP, generator)
            return loss_of_batch(model, task, views, captions, index, prompts)

        return loss_of

    value = training.Plan("value", args.steps, args.batch, 1e-3, 0.05, args.save_every, half=True)
    fused = training.Plan("fused", args.fused_steps, args.fused_batch, 5e-4, 0.05, args.save_every, half=True)
    training.run(value, model, loss_for(VALUE), len(images), args.output, generator)
    training.run(fused, model, loss_for(FUSED), len(images), args.output, generator)
    export(model, args.output)
    training.write_record(args.output, vars(args), device, time.time() - began)


def export(model: nn.Module, folder: Path) -> None:
    """Write an open_clip local-dir: config and float16 weights."""
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(training.halves(model.state_dict()), folder / "open_clip_model.safetensors")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the finished model and its checkpoint"
    )
    parser.add_argument("--cache", type=Path, default=Path("build/scenes"), help="folder of the drawn scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=1200, help="of the first phase: patches by the value path")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--fused-steps", type=int, default=1200, help="of the second phase: patches by fused attention"
    )
    parser.add_argument("--fused-batch", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: its own choice")
    parser.add_argument("--device", default="auto")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
