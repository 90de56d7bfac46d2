"""URIs: local paths, and the schemes of the stores that may be read."""

import os
from pathlib import Path

import fsspec

from cliper.pipeline.errors import StorageError

# Stores that a URI of an input, a list or a run may name. fsspec reaches far more: caches and archives of any
# other URI, hosts over SSH, the driver's own Git repositories.
SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "adl", "hf", "http", "https", "memory")
MORE_SCHEMES = "CLIPER_SCHEMES"  # environment: further ones, separated by commas
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}


def is_local(uri: str) -> bool:
    """Return whether a URI is a path on this machine."""
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """The one form of a URI: a local path from the root, `~` expanded; a scheme in lower case, s3a as s3.

    Ray's workers need not stand in the folder a command was given in.
    """
    if "://" not in uri:
        return str(Path(uri).expanduser().absolute())
    scheme, _, rest = uri.partition("://")
    return f"{_ALIASES.get(scheme.lower(), scheme.lower())}://{rest}"


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI."""
    return "/".join([uri.rstrip("/") or "/", *parts])


def check_scheme(uri: str, scheme: str) -> None:
    """Raise StorageError for a scheme that is not allowed; several in one URI ("a::b://") never are."""
    allowed = (*SCHEMES, *os.environ.get(MORE_SCHEMES, "").replace(" ", "").split(","))
    if scheme not in allowed or "::" in scheme:
        raise StorageError(
            f"{uri:.200}: {scheme}:// is not read; use a local path, s3://, gs://, az:// or http(s)://. "
            f"The variable {MORE_SCHEMES} allows others that fsspec has; URIs chained with '::' are never read"
        )
    if scheme not in fsspec.available_protocols():
        raise StorageError(f"{uri:.200}: fsspec has no storage called {scheme}://")
