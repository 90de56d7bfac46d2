"""The hashes that identify the weights of CLIPer's networks."""

from cliper.model.config import CLIPerConfig
from cliper.model.loading.pretrained import hash_of, resolve_pretrained
from cliper.model.loading.weights import resolve_backbone, resolve_diffusion, sha256_of


def cliper_hashes(config: CLIPerConfig) -> dict[str, str]:
    """SHA-256 of the files of the backbone, and of Stable Diffusion and DINO if they are used.

    Raises WeightsError if they are missing or would not load, ConfigError if the settings do not fit them.
    """
    backbone, fgc, dino = config.backbone, config.fgc, config.dino
    embedded = backbone.model.startswith("embedded:") and (fgc is None or fgc.model.startswith("embedded:"))
    if not embedded or dino is not None:
        from cliper.model.loading.check import check_weights  # imports the libraries that load weights: seconds

        check_weights(config)
    hashes = {"backbone": sha256_of(resolve_backbone(backbone).files)}
    if fgc is not None:
        hashes["fgc"] = sha256_of(resolve_diffusion(fgc).files)
    if dino is not None:
        hashes["dino"] = hash_of(resolve_pretrained(dino.model, dino.revision, "dino.model"))
    return hashes
