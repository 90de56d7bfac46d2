"""Upload an export of the format `huggingface` to the Hugging Face hub, as a dataset repository.

The token is that of the hub's own client: HF_TOKEN, or `hf auth login`. It is never an option and never printed.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from cliper.pipeline.errors import ExportError
from cliper.pipeline.export.driver import LISTING, MARKER

T = TypeVar("T")

ATTEMPTS = 3  # of every step; the client itself repeats single requests, and skips files that have arrived
PAUSE = 2.0  # seconds before the second attempt; doubled before the third


def open_repository(repository: str, private: bool) -> str:
    """Create the dataset repository `OWNER/NAME`, or find it; returns its address.

    Raises ExportError without a token, for a name or a token that the hub refuses, if the hub cannot be reached,
    and if `private` is asked for and the repository is public.
    """
    from huggingface_hub import HfApi, get_token

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ExportError(f"--push '{repository}': expected OWNER/NAME, e.g. your-name/masks")
    if get_token() is None:
        raise ExportError("--push needs a token that may write: set HF_TOKEN, or run 'hf auth login'")
    api = HfApi()
    create = lambda: api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)  # noqa: E731
    address = str(_repeated(repository, create))
    if private and not _repeated(repository, lambda: api.dataset_info(repository)).private:
        raise ExportError(f"{address} exists and is public; leave --private out, or push to another name")
    return address


def upload(folder: str, repository: str, message: str) -> None:
    """Replace the data of the repository by those of a finished export, a local folder. Raises ExportError.

    Files of a previous push that this export does not have are removed; other files stay.
    """
    from huggingface_hub import HfApi

    _repeated(
        repository,
        lambda: HfApi().upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=folder,
            ignore_patterns=[MARKER, LISTING, ".cliper/*"],
            delete_patterns=["data/*.parquet"],
            commit_message=message,
        ),
    )


def _repeated(repository: str, operation: Callable[[], T]) -> T:
    """The operation's result, after up to ATTEMPTS attempts. Raises ExportError with the hub's reason."""
    for attempt in range(ATTEMPTS):
        try:
            return operation()
        except Exception as error:  # the hub client raises its own, httpx's and the system's types
            if attempt + 1 == ATTEMPTS or not _may_pass(error):
                raise ExportError(_refusal(repository, error)) from error
        time.sleep(PAUSE * 2**attempt)
    raise AssertionError("ATTEMPTS is at least 1")


def _status(error: BaseException) -> int | None:
    """The HTTP status of the first error of the chain that has one; None if the hub did not answer."""
    found: BaseException | None = error
    while found is not None:
        status = getattr(getattr(found, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        found = found.__cause__ or found.__context__
    return None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is None:
        return not isinstance(error, ValueError) and type(error).__name__ != "OfflineModeIsEnabled"
    return status in (408, 409, 412, 429) or status >= 500


def _refusal(repository: str, error: Exception) -> str:
    status = _status(error)
    if status in (401, 403):
        return (
            f"the hub refuses to write to '{repository}' ({status}); check the owner's name, and that the token "
            "(HF_TOKEN) has the permission to write there"
        )
    if status is not None:
        return f"the hub answers with error {status} for '{repository}'; run the same command again later"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"'{repository}' cannot be pushed: {type(error).__name__}, {reason}; the same command tries again"
