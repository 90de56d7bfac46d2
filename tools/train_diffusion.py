"""Train the embedded Stable Diffusion on procedural scenes: VAE first, then the UNet (no pixel labels).

    python -m tools.train_diffusion --output build/sd-0 --clip build/clip-0 --seed 0

The UNet learns to remove noise under the empty prompt, the only one FGC ever uses; three quarters of the timesteps
are drawn from the range around the one FGC reads, t = 101. After such a short training, the network would use
convolutions instead of attention, so additional losses train the self-attention of the finest up block: averaged
over all other places that its maps attend to, (1) the class of a place must equal the prediction of a trained
CLIP, if CLIP is confident, (2) the colors of a place must be preserved, and (3) near places are preferred to far
ones. CLIP's scores are coarse and learned from captions alone: they blur every border, so they teach the interior
of objects, and colors teach the borders. Run again to resume; the finished folder is a diffusers pipeline folder.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cliper.model._libraries import diffusers, transformers
from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig
from cliper.model.segmenter import CLIPer
from tools import training
from tools.scenes import CLASSES, classes_in

VAE: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 256,
    "mid_block_add_attention": False,
}
UNET: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (48, 64, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": (2, 2, 2, 2),  # Stable Diffusion's name for the number of heads
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
DISTANCE_WEIGHT, LOOKS_WEIGHT = 10.0, 0.3
SHARPEN = 3.0  # the teacher's scores are raised to this power
SURE = 0.5  # share of a place's best class above which the teacher counts, the more the higher
NEAR = 250  # timesteps below this are close to the one FGC reads
QUERIES = 256  # places of an image whose maps enter a step's losses


def to_pixels(images: Tensor) -> Tensor:
    """Uint8 [B, 3, h, w] to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def crops(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Cut one common random square of `side` out of [B, C, h, w]."""
    top, left = (int(torch.randint(n - side + 1, (1,), generator=generator)) for n in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def train_vae(vae: Any, images: Tensor, args: argparse.Namespace, generator: torch.Generator) -> None:
    """Absolute error of the reconstruction plus a small KL term, on crops of 128 pixels."""

    def loss_of(index: Tensor, _: int) -> Tensor:
        pixels = to_pixels(crops(images[index], 128, generator))
        posterior = vae.encode(pixels).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        return F.l1_loss(rebuilt.float(), pixels) + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()

    plan = training.Plan("vae", args.vae_steps, args.vae_batch, 2e-3, 0.0, args.save_every, half=True)
    training.run(plan, vae, loss_of, len(images), args.output, generator)


@torch.no_grad()
def encode_all(vae: Any, images: Tensor, batch: int) -> Tensor:
    """Posterior means of all scenes, float16 [n, 4, 32, 32], scaled to unit variance."""
    parts = [
        vae.encode(to_pixels(images[i : i + batch])).latent_dist.mean.half() for i in range(0, len(images), batch)
    ]
    latents = torch.cat(parts)
    vae.register_to_config(scaling_factor=round(float(1 / latents[:512].float().std()), 5))
    return latents * vae.config.scaling_factor


class Remember:
    """Attention processor that computes ordinary self-attention and keeps its query and key."""

    def __init__(self) -> None:
        self.query = self.key = torch.empty(0)

    def __call__(self, attn: Any, hidden_states: Tensor, **_: Any) -> Tensor:
        """Attend within `hidden_states` [B, N, C]; the interface is diffusers'."""
        self.query, self.key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, H, N, D]
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = F.scaled_dot_product_attention(self.query, self.key, value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    def maps(self, pictures: Tensor, places: Tensor) -> Tensor:
        """Attention of the queries at `places` [Q] in the chosen `pictures`, bool [B]: float32 [b, H, Q, N]."""
        query, key = self.query[pictures][:, :, places].float(), self.key[pictures].float()
        return torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, dim=-1)


def remember_maps(unet: Any) -> list[Remember]:
    """Attach a `Remember` to each self-attention of the finest up block."""
    found = []
    for transformer in unet.up_blocks[-1].attentions:
        found.append(Remember())
        transformer.transformer_blocks[0].attn1.set_processor(found[-1])
    return found


@torch.inference_mode()
def teacher_scores(folder: Path, images: Tensor, captions: list[str], side: int) -> Tensor:
    """Coarse scores of a trained CLIP for the captioned classes: [n, K, side * side], summing to 1 per place."""
    config = CLIPerConfig.model_validate(
        {
            "backbone": {"model": f"local-dir:{folder}"},
            "prompts": {"templates": ("a photo of a {}.",), "mean_class": False},
            "fusion": {"short_side": 160, "logit_scale": 20},
            "fgc": None,
        }
    )
    cliper = CLIPer.load(config, ClassList.parse(list(CLASSES)), images.device)
    parts = []
    for image, caption in zip(images, captions, strict=True):
        coarse = cliper.scores([image.permute(1, 2, 0).cpu().numpy()], [""]).coarse  # [1, K, h, w]
        named = torch.zeros(len(CLASSES), 1, 1, device=coarse.device)
        named[classes_in(caption)] = 1
        fine = F.interpolate(coarse * named, size=(side, side), mode="bilinear", align_corners=False)
        parts.append((fine / fine.sum(dim=1, keepdim=True).clamp(min=1e-6)).flatten(2))
    return torch.cat(parts)


def sharpened(scores: Tensor) -> Tensor:
    """Scores [B, K, N] raised to SHARPEN, summing to 1 per place again."""
    powers = scores.pow(SHARPEN)
    return powers / powers.sum(dim=1, keepdim=True).clamp(min=1e-6)


def looks_of(images: Tensor) -> Tensor:
    """Mean colour and deviation of every 8 x 8 block of uint8 [n, 3, h, w], scaled to unit variance: [n, 6, N]."""
    pixels = images.float() / 255
    mean = F.avg_pool2d(pixels, 8)
    deviation = (F.avg_pool2d(pixels.square(), 8) - mean.square()).clamp(min=0).sqrt()
    looks = torch.cat([mean, deviation], dim=1)
    centre, spread = looks.mean(dim=(0, 2, 3), keepdim=True), looks.std(dim=(0, 2, 3), keepdim=True)
    return ((looks - centre) / spread).flatten(2)


def elsewhere(maps: Tensor, places: Tensor) -> Tensor:
    """Maps [B, H, Q, N] of the queries `places` [Q] without each query's weight on itself, rows summing to 1."""
    others = maps * (1 - F.one_hot(places, maps.shape[-1]))
    return others / (others.sum(dim=-1, keepdim=True) + 1e-8)


def affinity_loss(others: Tensor, scores: Tensor, places: Tensor) -> Tensor:
    """Cross-entropy of the scores [B, K, N] at `places` and those that `others` [B, H, Q, N] collects.

    Places are weighted by confidence and so that every class of an image counts equally, regardless of its size.
    """
    target = scores.transpose(1, 2)[:, None]  # [B, 1, N, K]
    here = target[:, :, places]  # [B, 1, Q, K]
    sure = ((here.amax(dim=-1, keepdim=True) - SURE) / (1 - SURE)).clamp(min=0)
    weight = here / target.sum(dim=2, keepdim=True).clamp(min=1.0) * sure
    weight = weight / weight.sum(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    return -(weight * (others @ target).clamp(min=1e-6).log()).sum(dim=(2, 3)).mean()


def looks_loss(others: Tensor, looks: Tensor, places: Tensor) -> Tensor:
    """Mean squared difference of the looks [B, C, N] at `places` and those that `others` [B, H, Q, N] collects."""
    target = looks.transpose(1, 2)[:, None]  # [B, 1, N, C]
    return F.mse_loss(others @ target, target[:, :, places].expand(-1, others.shape[1], -1, -1))


def distance_loss(maps: Tensor, places: Tensor) -> Tensor:
    """Mean squared distance, in sides of the image, that maps [B, H, Q, N] of a square grid attend over."""
    side = round(maps.shape[-1] ** 0.5)
    line = torch.arange(side, device=maps.device) / side
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).flatten(0, 1)  # [N, 2]
    apart = (grid[places][:, None] - grid[None]).square().sum(dim=-1)  # [Q, N]
    return (maps * apart).sum(dim=-1).mean()


def train_unet(
    unet: Any,
    latents: Tensor,
    scores: Tensor,
    looks: Tensor,
    prompt: Tensor,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """Predict the noise (Ho et al. 2020), with the attention task for timesteps near the one FGC reads."""
    remembered, scheduler = remember_maps(unet), diffusers.PNDMScheduler(**SCHEDULER)

    def attention_loss(index: Tensor, near: Tensor) -> Tensor:
        """The three losses of the maps, of those of the scenes `index` [B] that are `near`, bool [B]."""
        places = torch.randperm(scores.shape[-1], generator=generator)[:QUERIES].to(near.device)
        with torch.autocast(near.device.type, enabled=False):
            maps = torch.cat([layer.maps(near, places) for layer in remembered], dim=1)  # [b, layers * H, Q, N]
            others, chosen = elsewhere(maps, places), index[near]
            return (
                affinity_loss(others, sharpened(scores[chosen]), places)
                + LOOKS_WEIGHT * looks_loss(others, looks[chosen], places)
                + DISTANCE_WEIGHT * distance_loss(maps, places)
            )

    def loss_of(index: Tensor, _: int) -> Tensor:
        """The losses of the latents `index` [B], added up."""
        clean = latents[index].float()
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        steps = timesteps(len(clean), generator).to(clean.device)
        noisy = scheduler.add_noise(clean, noise, steps)
        guess = unet(noisy, steps, encoder_hidden_states=prompt.expand(len(clean), -1, -1)).sample
        loss, near = F.mse_loss(guess.float(), noise), steps < NEAR
        return loss + attention_loss(index, near) if near.any() else loss

    plan = training.Plan("unet", args.unet_steps, args.unet_batch, 1e-3, 0.01, args.save_every, half=True)
    training.run(plan, unet, loss_of, len(latents), args.output, generator)


def timesteps(count: int, generator: torch.Generator) -> Tensor:
    """A quarter from [0, 1000), the rest from [0, NEAR): int64 [count]."""
    drawn = torch.rand(count, generator=generator)
    near = torch.rand(count, generator=generator) < 0.75
    return (drawn * torch.where(near, float(NEAR), 1000.0)).long()


def build_text(folder: Path) -> Tensor:
    """Write a byte-level tokenizer and a small random text encoder; returns "" embedded, [1, 77, 32].

    Only the empty prompt is ever used, so the encoder is a constant and is not trained.
    """
    tokens = [chr(c) for c in range(33, 127)]
    vocabulary = {
        t: i for i, t in enumerate([*tokens, *(t + "</w>" for t in tokens), "<|startoftext|>", "<|endoftext|>"])
    }
    folder.joinpath("tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        folder / "tokenizer", pad_token="<|endoftext|>", model_max_length=77
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    size = len(vocabulary)
    config = transformers.CLIPTextConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    encoder = transformers.CLIPTextModel(config).eval().half()
    encoder.save_pretrained(folder / "text_encoder")
    ids = tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder.float()(ids)[0]


def train(args: argparse.Namespace) -> None:
    """Train both networks, resuming from a killed run, and export a diffusers folder."""
    device, began = training.pick_device(args.device, args.threads), time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    images, captions = training.load_scenes(args.scenes, args.cache, args.workers)
    images = images.to(device)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    prompt = build_text(args.output).to(device)
    vae = diffusers.AutoencoderKL(**VAE).to(device)
    unet = diffusers.UNet2DConditionModel(**UNET).to(device)
    train_vae(vae, images, args, generator)
    latents = encode_all(vae.eval(), images, 32)
    scores = teacher_scores(args.clip, images, captions, latents.shape[-1])
    print(f"latents scaled by {vae.config.scaling_factor}, {time.time() - began:.0f} s", flush=True)
    train_unet(unet, latents, scores, looks_of(images), prompt, args, generator)
    export(vae, unet, args.output)
    training.write_record(args.output, vars(args), device, time.time() - began)


def export(vae: Any, unet: Any, folder: Path) -> None:
    """Write float16 weights in diffusers' layout."""
    vae.cpu().half().save_pretrained(folder / "vae")
    unet.cpu().half().save_pretrained(folder / "unet")
    diffusers.PNDMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    parts = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(
        json.dumps(index | parts | {"requires_safety_checker": False}, indent=2)
    )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the finished model and its checkpoints"
    )
    parser.add_argument(
        "--clip", type=Path, required=True, help="open_clip local-dir whose scores the maps must keep"
    )
    parser.add_argument("--cache", type=Path, default=Path("build/scenes"), help="folder of the drawn scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--vae-steps", type=int, default=400)
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--unet-steps", type=int, default=800)
    parser.add_argument("--unet-batch", type=int, default=4)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: its own choice")
    parser.add_argument("--device", default="auto")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
