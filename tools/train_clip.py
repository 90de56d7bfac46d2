"""Train the embedded CLIP on procedural scenes and their captions (no pixel labels).

    python -m tools.train_clip --out build/clip-0 --seed 0

Four losses, all from captions alone. (1) CLIP's: pictures and captions of a batch find each other.
(2) Multiple instance: patches are softmaxed over the class names, and every captioned class must have some of
them (the mean of its best ones is pushed to 1). (3) No patch may belong to a class the caption does not name.
(2) and (3) are asked of early-layer fusion in every layer. (4) Coherence: the fused attention over all other
places must give a place back the classes it has, where they are sure; so the maps learn to stay within objects.
The first phase sees small pictures, the second the model's own size; all layers share the converged Sinkhorn map,
half the time of one map each. Run again to resume; the finished folder is an open_clip local-dir.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cliper_model._libraries import open_clip
from cliper_model.backbone import Vision, encode
from cliper_model.config import FusionConfig
from cliper_model.fusion import layer_logits
from tools import training
from tools.scenes import CLASSES, classes_in

IMAGE_SIDE = 160
STORED_SIDE = 192  # pictures are kept a little larger than the model sees them, for crops
SMALL_SIDE = 96  # the first phase sees small pictures: a third of the patches, a fifth of the time
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
SURE_PLACES = 5.0  # a class with fewer sure places than these weighs less in the coherence loss
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


def coherence_loss(attention: Tensor, logits: Tensor, named: Tensor) -> Tensor:
    """Cross-entropy between a place's classes and what the attention gathers from all other places.

    `attention` [B, P, P], patch logits [L, B, K, P], captioned classes, bool [B, K]. The classes are the mean over
    layers, sharpened (third power), of captioned classes only, and take no gradient. A place weighs nothing up
    to half a share; every class of a picture weighs alike, however large it is.
    """
    with torch.no_grad():
        shares = logits.softmax(dim=2).mean(dim=0).clamp(min=1e-6) ** 3 * named[:, :, None]
        shares = (shares / shares.sum(dim=1, keepdim=True)).transpose(1, 2)  # [B, P, K]
        sure = (2 * shares.amax(dim=2) - 1).clamp(min=0)  # [B, P]
        winner = F.one_hot(shares.argmax(dim=2), shares.shape[2]).float()  # [B, P, K]
        size = (winner * sure[..., None]).sum(dim=1, keepdim=True).clamp(min=SURE_PLACES)  # [B, 1, K]
        weight = sure / (winner * size).sum(dim=2) / named.sum(dim=1, keepdim=True)  # [B, P]
    others = attention.float() * (1 - torch.eye(attention.shape[-1], device=attention.device))
    others = others / others.sum(dim=-1, keepdim=True).clamp(min=1e-8)
    gathered = (others @ shares).clamp(min=1e-4)  # [B, P, K]
    return (-(shares * gathered.log()).sum(dim=2) * weight).sum(dim=1).mean()


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


def loss_of_batch(
    model: Any, contrast: float, views: Tensor, captions: "Captions", index: Tensor, prompts: Tensor
) -> Tensor:
    """The losses of scenes `index` [B] seen as `views` [B, 3, h, w], added up; CLIP's weighs `contrast`."""
    vision = encode(model.visual, normalise(views), "float32")
    sentences = F.normalize(model.encode_text(captions.tokens[index]).float(), dim=-1)
    classes = F.normalize(model.encode_text(prompts).float(), dim=-1)  # [K, C]
    scale = model.logit_scale.exp().clamp(max=100)
    pairs = contrastive_loss(picture_vectors(model.visual, vision), sentences, scale)
    side, named = views.shape[-1] // MODEL["vision_cfg"]["patch_size"], captions.named[index]
    config = FusionConfig(attention="fused", logit_scale=PATCH_SCALE, sinkhorn="converged")
    seen = layer_logits(model.visual, vision, classes, config, (side, side))
    dense = seen.logits.flatten(3).float()  # [L, B, K, P]
    found, allowed = instance_losses(dense, named, int(BEST * side * side))
    return contrast * pairs + found + allowed + coherence_loss(seen.attention, dense, named)


def train(args: argparse.Namespace) -> None:
    """Train both phases, resuming from the checkpoints in `args.out` if there are any, and export."""
    device, began = training.pick_device(args.device, args.threads), time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    images, texts = training.load_scenes(args.scenes, args.cache, args.workers)
    images, captions = training.shrink(images.to(device), STORED_SIDE), Captions(texts, device)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = build_model().to(device).train()

    def loss_for(side: int, contrast: float) -> Any:
        def loss_of(index: Tensor, _: int) -> Tensor:
            prompts = captions.prompts[torch.randint(len(TEMPLATES), (1,), generator=generator).item()]
            views = training.random_views(images[index], side, SMALLEST_CROP, generator)
            return loss_of_batch(model, contrast, views, captions, index, prompts)

        return loss_of

    small = training.Plan("small", args.steps, args.batch, 1e-3, 0.05, args.save_every, half=True)
    full = training.Plan("full", args.full_steps, args.full_batch, 5e-4, 0.05, args.save_every, half=True)
    training.run(small, model, loss_for(SMALL_SIDE, 1.0), len(images), args.out, generator)
    training.run(full, model, loss_for(IMAGE_SIDE, 0.1), len(images), args.out, generator)
    export(model, args.out)
    training.write_record(args.out, vars(args), device, time.time() - began)


def export(model: nn.Module, folder: Path) -> None:
    """Write an open_clip local-dir: config and float16 weights."""
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(training.halves(model.state_dict()), folder / "open_clip_model.safetensors")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model and its checkpoint")
    parser.add_argument("--cache", type=Path, default=Path("build/scenes"), help="folder of the drawn scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=1000, help="of the first phase, on small pictures")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--full-steps", type=int, default=500, help="of the second phase, at the model's own size")
    parser.add_argument("--full-batch", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: its own choice")
    parser.add_argument("--device", default="auto")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
