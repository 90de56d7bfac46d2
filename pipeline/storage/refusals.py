"""What a user is told when a store refuses or fails."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from cliper.pipeline.errors import StorageError, text_of
from cliper.pipeline.storage.uris import is_local


@contextmanager
def access_errors(uri: str) -> Iterator[None]:
    """Turn a store's refusals into one clear StorageError; FileNotFoundError passes through."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise refusal(uri, error) from error
    except Exception as error:
        if type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
            raise refusal(uri, error) from error
        raise


def refusal(uri: str, error: Exception) -> StorageError:
    """The message for a user when an operation on `uri` fails with `error`."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"no space left for {uri}; free some and run the same command again")
    if isinstance(error, PermissionError) and is_local(uri):
        return StorageError(f"cannot access {uri}: {error.strerror}; check its owner and mode")
    return StorageError(f"cannot access {uri}: {explain(error)}")


def explain(error: Exception) -> str:
    """One line with the meaning of a storage error and the next step."""
    reason = (text_of(error).splitlines() or [""])[0][:300]
    hints = {
        "PermissionError": "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or --storage-option)",
        "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or --storage-option anon=true",
        "IsADirectoryError": "it is a folder, and a file is needed",
        "NotADirectoryError": "a part of the path is a file, and a folder is needed",
        "EndpointConnectionError": "check the endpoint (AWS_ENDPOINT_URL, or --storage-option endpoint_url=...)",
    }
    hint = hints.get(type(error).__name__)
    return f"{type(error).__name__}: {reason}" + (f"; {hint}" if hint else "")
