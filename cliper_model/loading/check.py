"""Check weights before they are loaded: configurations, file headers, and that the two match.

The driver runs these checks before it starts Ray, and every load repeats them. They read headers only.
"""

import re
from pathlib import Path
from typing import Any

import torch

from cliper.model._libraries import diffusers, open_clip, transformers
from cliper.model.config import CLIPerConfig, FGCConfig
from cliper.model.errors import WeightsError
from cliper.model.loading.files import read_json
from cliper.model.loading.tensors import require, sizes_in
from cliper.model.loading.weights import Backbone, Diffusion, resolve_backbone, resolve_diffusion
from cliper.model.unet import attention_modules, wanted_layers

SUPPORTED = "FGC reads Stable Diffusion 1.x and 2.x"
# Their noise is sqrt(a) x + sqrt(1 - a) n at an integer timestep, and the UNet's input is not scaled. The Euler,
# Heun and DPM solvers scale the input and use other timesteps; flow matching adds other noise.
SCHEDULERS = ("PNDMScheduler", "DDIMScheduler", "DDPMScheduler")
# A UNet with one of these set needs inputs that Stable Diffusion does not have.
_OTHER_INPUTS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")

# Names of attention layers in checkpoints older than diffusers 0.14; diffusers renames them when it loads them.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def check_weights(config: CLIPerConfig) -> None:
    """Check all weights that a configuration loads. Raises WeightsError or ConfigError."""
    if not config.backbone.model.startswith("embedded:"):
        check_backbone(resolve_backbone(config.backbone), config.backbone.model)
    if config.fgc is not None and not config.fgc.model.startswith("embedded:"):
        check_diffusion(resolve_diffusion(config.fgc), config.fgc)
    if config.dino is not None:
        from cliper.model.networks.dino import check_dino

        check_dino(config.dino)


def clip_settings(found: Backbone) -> dict[str, Any]:
    """The architecture of a backbone in open_clip's form: `embed_dim`, `vision_cfg`, `text_cfg`, ..."""
    if not found.name.startswith("local-dir:"):
        return dict(open_clip.get_model_config(found.name))
    path = Path(found.name.removeprefix("local-dir:")) / "open_clip_config.json"
    settings = read_json(path).get("model_cfg")
    if not isinstance(settings, dict) or not {"vision_cfg", "text_cfg", "embed_dim"} <= settings.keys():
        raise WeightsError(f"{path} has no complete model_cfg (embed_dim, vision_cfg, text_cfg)")
    return settings


def unsupported(settings: dict[str, Any]) -> str | None:
    """Why the fusion cannot read a vision tower with these settings (in open_clip's form); None if it can."""
    vision = settings["vision_cfg"]
    if "timm_model_name" in vision:
        return (
            f"its tower is {vision['timm_model_name']} of timm, whose blocks and pooling differ (SigLIP, EVA, "
            "PE-Core, MobileCLIP, ConvNeXt)"
        )
    if not isinstance(vision.get("layers"), int):
        return "its tower is a ResNet, which has no tokens of patches"
    if vision.get("attentional_pool"):
        return "it pools by attention (CoCa), so that patches are not in the text's space"
    return None


def check_backbone(found: Backbone, name: str) -> None:
    """Raise WeightsError if a backbone is not a plain ViT, or its checkpoint is broken or does not fit it."""
    settings = clip_settings(found)
    reason = unsupported(settings)
    if reason is not None:
        raise WeightsError(
            f"backbone '{name}' is not a plain ViT with a CLS token: {reason}; use e.g. ViT-B-16, ViT-L-14"
        )
    found_sizes = {key.removeprefix("module."): size for key, size in sizes_in([found.checkpoint]).items()}
    other_text = "custom_text" in settings or "hf_model_name" in settings["text_cfg"]
    if "visual.conv1.weight" not in found_sizes or other_text:
        return  # a form that open_clip converts; it can only be checked by loading it
    with torch.device("meta"):
        model = open_clip.CLIP(**settings)
    # Positions are resized to the architecture's grid when they are loaded.
    wanted = {key: size for key, size in _sizes(model).items() if not key.endswith("positional_embedding")}
    require(wanted, found_sizes, str(found.checkpoint), name)


def check_diffusion(found: Diffusion, config: FGCConfig) -> None:
    """Raise WeightsError if a diffusers folder is not a Stable Diffusion 1.x or 2.x that will load.

    Raises ConfigError if `config.layers` are not layers of its UNet.
    """
    check_scheduler(found.folder)
    settings = read_json(found.folder / "unet" / "config.json")
    vae = read_json(found.folder / "vae" / "config.json")
    encoder = read_json(found.folder / "text_encoder" / "config.json")
    _check_architecture(found.folder, settings, vae, encoder)
    with torch.device("meta"):
        unet = _build(diffusers.UNet2DConditionModel, settings, found.folder / "unet")
        autoencoder = _build(diffusers.AutoencoderKL, vae, found.folder / "vae")
    wanted_layers(config, attention_modules(unet))
    _check_tensors(found, "unet", _sizes(unet))
    encoding = {k: n for k, n in _sizes(autoencoder).items() if k.startswith(("encoder.", "quant_conv."))}
    _check_tensors(found, "vae", encoding)
    _check_text_encoder(found)


def check_scheduler(folder: Path) -> str:
    """The name of the scheduler's class. Raises WeightsError for one whose noise FGC cannot use."""
    name = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    if name not in SCHEDULERS:
        raise WeightsError(
            f"{folder}: the scheduler is {name!r}; supported: {', '.join(SCHEDULERS)}. Use a copy of the model "
            "whose scheduler/scheduler_config.json is that of stable-diffusion-2-1-base"
        )
    return str(name)


def _check_architecture(folder: Path, unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]) -> None:
    """Refuse other diffusion models, which would load and then fail at every image."""
    if (channels := unet.get("in_channels")) != 4:
        raise WeightsError(
            f"{folder}: the UNet takes {channels} channels, not 4 (inpainting or depth models?); {SUPPORTED}"
        )
    other = [f"{key}={unet[key]!r}" for key in _OTHER_INPUTS if unet.get(key) is not None]
    if other:
        raise WeightsError(f"{folder}: the UNet needs more inputs than text ({other[0]}: SDXL?); {SUPPORTED}")
    if vae.get("latent_channels", 4) != 4 or len(vae.get("block_out_channels", ())) != 4:
        raise WeightsError(f"{folder}: the VAE does not make 4 channels at 1/8 of the side; {SUPPORTED}")
    if unet.get("cross_attention_dim") != text.get("hidden_size"):
        raise WeightsError(
            f"{folder}: the UNet expects text vectors of {unet.get('cross_attention_dim')}, the text encoder "
            f"makes {text.get('hidden_size')}; {SUPPORTED}"
        )


def _build(network: Any, settings: dict[str, Any], place: Path) -> Any:
    """Build a network from its configuration; the caller selects the meta device, which allocates no weights."""
    try:
        return network.from_config(settings)
    except Exception as error:  # diffusers raises many types for wrong values
        raise WeightsError(f"{place / 'config.json'} does not describe a network: {error}") from error


def _sizes(network: torch.nn.Module) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in network.state_dict().items()}


def _check_tensors(found: Diffusion, part: str, wanted: dict[str, int]) -> None:
    files = [found.folder / name for name in found.network(part).weights]
    names = {_modern(name): size for name, size in sizes_in(files).items()}
    require(wanted, names, str(files[0]))


def _modern(name: str) -> str:
    """`...attentions.0.query.weight` -> `...attentions.0.to_q.weight`."""
    return re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.)", lambda match: _OLD_NAMES[match[1]], name)


def _check_text_encoder(found: Diffusion) -> None:
    """Check the text encoder's weights and that the tokenizer can be read; both run once, in the actor."""
    try:
        settings = transformers.CLIPTextConfig.from_pretrained(found.folder / "text_encoder")
        with torch.device("meta"):
            encoder = transformers.CLIPTextModel(settings)
    except Exception as error:  # as in _build
        raise WeightsError(f"{found.folder / 'text_encoder'} is not a CLIP text encoder: {error}") from error
    files = [found.folder / name for name in found.network("text_encoder").weights]
    bare = {name.removeprefix("text_model."): size for name, size in sizes_in(files).items()}
    wanted = {
        name.removeprefix("text_model."): n for name, n in _sizes(encoder).items() if "position_ids" not in name
    }
    require(wanted, bare, str(files[0]))
    tokens = empty_prompt(found.folder)
    if int(tokens.max()) >= settings.vocab_size:
        raise WeightsError(f"{found.folder}: the tokenizer has more words than the text encoder")


def empty_prompt(folder: Path) -> torch.Tensor:
    """Tokens of the empty prompt, int64 [1, context]. Raises WeightsError if the tokenizer cannot be read."""
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        length = tokenizer.model_max_length
        tokens = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    except Exception as error:  # as in _build
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{folder / 'tokenizer'} cannot be read: {reason}") from error
    ids: torch.Tensor = tokens.input_ids
    return ids
