"""Retries for remote storage: exponential backoff with full jitter, bounded in number and time.

The clients' own retries are off (backend.py), because layers multiply: a stalled read retried 5 x 6 times takes
half an hour. Here an operation is tried ATTEMPTS times at most, and no attempt starts later than LAST_START
seconds after the first; the last one still has its own time-outs (storage._S3_CLIENT). A store that answers at
once with errors is given up after 12 seconds on average, one that is silent after about two and a half minutes.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 8
FIRST_PAUSE = 0.2  # seconds; doubled every time
LAST_START = 120.0  # seconds after the first attempt

_STATUSES = {429, 500, 502, 503, 504, 507}
# Errors that some stores report with another status, and bodies that arrived damaged.
_CODES = {"SlowDown", "Throttling", "RequestTimeout", "InternalError", "OperationAborted", "BadDigest"}
_CODES |= {"TooManyRequests", "RequestLimitExceeded", "XAmzContentSHA256Mismatch", "ServiceUnavailable"}
# Base classes in botocore, aiohttp and fsspec, by name, so that local runs import none of them.
_NETWORK = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError", "TimeoutError"}
_NETWORK |= {"ClientPayloadError", "ClientConnectionError", "ResponseStreamingError", "FSTimeoutError"}
# The store refuses our keys, not one object.
_KEYS = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"}


def with_retries(operation: Callable[[], T]) -> T:
    """Return the operation's result; raises its last error, or its first that another attempt cannot mend."""
    last: Exception | None = None
    for _ in attempts():
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
            last = error
    assert last is not None
    raise last


def fetch_with_retries(
    fetch: Callable[[Sequence[int]], Sequence[bytes | Exception]],
    count: int,
    most: int = ATTEMPTS,
    last_start: float = LAST_START,
) -> list[bytes | Exception]:
    """Call `fetch` with the places 0 to count - 1, and again with those that failed for a passing reason."""
    results: list[bytes | Exception] = [b""] * count
    left: Sequence[int] = range(count)
    for _ in attempts(most, last_start):
        for place, result in zip(left, fetch(left), strict=True):
            results[place] = result
        left = [i for i in left if isinstance(error := results[i], Exception) and is_transient(error)]
        if not left:
            break
    return results


def attempts(most: int = ATTEMPTS, last_start: float = LAST_START) -> Iterator[int]:
    """Yield 0, 1, ... before every attempt, pausing in between, until number or time are used up."""
    start = time.monotonic()
    for attempt in range(most):
        if attempt:
            time.sleep(random.uniform(0, FIRST_PAUSE * 2 ** (attempt - 1)))
        if attempt and time.monotonic() - start > last_start:
            return
        yield attempt


def is_transient(error: BaseException) -> bool:
    """Return whether another attempt may succeed: throttling, a server's error, a broken connection or body."""
    answer = _answer(error)
    if answer is not None:
        code, status = answer
        return status in _STATUSES or code in _CODES
    return any(base.__name__ in _NETWORK for base in type(error).__mro__)


def is_unavailable(error: BaseException) -> bool:
    """Return whether the store itself is down or overloaded, in contrast to one object that does not arrive."""
    connects = any(base.__name__ in ("ConnectionError", "ClientConnectionError") for base in type(error).__mro__)
    return is_transient(error) and (connects or _answer(error) is not None)


def refuses_keys(error: BaseException) -> bool:
    """Return whether the store refused our keys altogether (expired, unknown), so that no object can be read."""
    answer = _answer(error)
    return answer is not None and answer[0] in _KEYS


def forbids(error: BaseException) -> bool:
    """Return whether the store refused access to the object: its own matter, or that of all of them."""
    answer = _answer(error)
    return isinstance(error, PermissionError) or (answer is not None and answer[1] == 403)


def error_code(error: BaseException) -> str:
    """The store's own code of an error, e.g. "NoSuchKey" or "412"; "" if it did not answer."""
    answer = _answer(error)
    return answer[0] if answer else ""


def _answer(error: BaseException | None) -> tuple[str, int] | None:
    """(code, HTTP status) of the first error in the chain of causes that carries a store's answer."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", "")), int(status)
        error = error.__cause__
    return None
