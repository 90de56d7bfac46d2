"""S3 uploads that were begun and never completed: invisible in listings, but stored and paid for."""

from collections.abc import Iterator
from typing import Any

from cliper.pipeline.storage.backend import Storage
from cliper.pipeline.storage.refusals import access_errors


def incomplete_uploads(storage: Storage, uri: str) -> Iterator[tuple[str, str]]:
    """Yield (key relative to `uri`, upload id) of every incomplete upload below an s3:// prefix; else nothing.

    Raises StorageError where the store refuses to list them.
    """
    if not uri.startswith("s3://"):
        return
    filesystem, path = storage.filesystem(uri)
    bucket, _, key = path.partition("/")
    prefix = f"{key}/" if key else ""
    page: dict[str, Any] = {"NextKeyMarker": "", "NextUploadIdMarker": "", "IsTruncated": True}
    while page["IsTruncated"]:
        where = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        more = {name: marker for name, marker in where.items() if marker}
        with access_errors(uri):
            try:
                page = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **more)
            except FileNotFoundError as error:
                if "NoSuchUpload" not in str(error):
                    raise
                return  # what some stores answer for a bucket that never had an upload in parts
        for upload in page.get("Uploads", []):
            yield upload["Key"].removeprefix(prefix), upload["UploadId"]
        page.setdefault("IsTruncated", False)


def abort_upload(storage: Storage, uri: str, upload_id: str) -> None:
    """Give up an incomplete upload; its parts are deleted. Raises StorageError."""
    filesystem, path = storage.filesystem(uri)
    bucket, _, key = path.partition("/")
    with access_errors(uri):
        filesystem.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)
