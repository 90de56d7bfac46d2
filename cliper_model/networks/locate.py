"""Find the weights of the networks and pin their revisions, without torch: missing files are reported early."""

from typing import Any, TypeVar, cast

from cliper.model.loading.pretrained import Pretrained, resolve_pretrained
from cliper.model.loading.weights import pin as pin_cliper
from cliper.model.networks.configs import MasksConfig, Sam3ActiveConfig, Sam3Config, Tipsv2Config

Located = TypeVar("Located", bound=Sam3Config | Tipsv2Config | MasksConfig)


def locate(config: Sam3Config | Tipsv2Config | MasksConfig) -> Pretrained:
    """The files of SAM 3 or TIPSv2 (`model`), or of SAM 2 (`weights`). Raises WeightsError."""
    if isinstance(config, MasksConfig):
        return resolve_pretrained(config.weights, config.revision, "model.weights")
    return resolve_pretrained(config.model, config.revision, "model.model")


def pin(config: Located) -> Located:
    """The same settings with hub revisions replaced by their current commits. Raises WeightsError."""
    return cast(Located, config.model_copy(update=_commits(config)))  # mypy widens it to the union


def _commits(config: Sam3Config | Tipsv2Config | MasksConfig) -> dict[str, Any]:
    found: dict[str, Any] = {} if (commit := locate(config).commit) is None else {"revision": commit}
    if isinstance(config, Sam3ActiveConfig):
        found["proposer"] = pin_cliper(config.proposer)
    return found
