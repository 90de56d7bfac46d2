"""What S3 alone needs: the client's settings, and a listing that streams."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from cliper.pipeline.storage.retry import with_retries

CLIENT = {
    # Stalls end in an error that is retried, never in a hang. Seconds without a connection, or without a byte.
    "connect_timeout": 10,
    "read_timeout": 30,
    "retries": {"total_max_attempts": 1},  # retry.py retries; two layers would multiply
    # Stores other than AWS send the whole object's checksum with a byte range, which then cannot match.
    "response_checksum_validation": "when_required",
    "request_checksum_calculation": "when_required",
}
PAGE = 1000  # keys per listing request, the protocol's maximum


def s3_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in time-outs, retries and the endpoint from the environment around the user's own options."""
    merged = dict(options)
    merged["config_kwargs"] = CLIENT | dict(merged.get("config_kwargs", {}))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        merged.setdefault("endpoint_url", endpoint)
    # Listings must be fresh: a resumed run asks which shards exist.
    return merged | {"use_listings_cache": False}


def list_s3(filesystem: Any, path: str) -> Iterator[tuple[str, int, float, str | None]]:
    """Yield (path relative to `path`, bytes, seconds since 1970 by the store's clock, ETag) below a prefix."""
    bucket, _, key = path.partition("/")
    prefix = f"{key}/" if key else ""
    list_page = partial(filesystem.call_s3, "list_objects_v2")
    page: dict[str, Any] = {}
    while True:
        token = page.get("NextContinuationToken")
        more = {"ContinuationToken": token} if token else {}
        page = with_retries(partial(list_page, Bucket=bucket, Prefix=prefix, MaxKeys=PAGE, **more))
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):  # zero-byte folder markers
                name, modified = entry["Key"].removeprefix(prefix), entry["LastModified"].timestamp()
                yield name, int(entry["Size"]), modified, entry.get("ETag")
        if not page.get("IsTruncated"):
            return
