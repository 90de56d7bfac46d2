"""Libraries that only some commands need: the package's extras."""

from importlib.util import find_spec

from cliper.pipeline.errors import MissingExtraError


def require(extra: str, what: str, *modules: str) -> None:
    """Raise MissingExtraError, which names `what` and the extra, unless all modules are installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"{what} needs {' and '.join(missing)}: pip install 'cliper[{extra}]'")
