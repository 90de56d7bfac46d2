"""The Hugging Face hub: from a repository and a revision to files on this machine, at one commit.

One request resolves the revision; a refusal is final and is never retried. Cached files are used if the hub cannot
be reached; for a commit hash they are used without any request, because commits do not change.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from cliper.model.errors import WeightsError

SECONDS = 10  # for the hub to answer whether it has a repository
_COMMIT = re.compile(r"[0-9a-f]{40}")

Choose = Callable[[Collection[str]], Sequence[str]]


@contextlib.contextmanager
def downloads_as_before() -> Iterator[None]:
    """Keep the hub's progress bars enabled: transformers and diffusers disable them together with their own."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    try:
        yield
    finally:
        (disable_progress_bars if disabled else enable_progress_bars)()


@contextlib.contextmanager
def silent_downloads() -> Iterator[None]:
    """Disable progress bars: those of several actors would mix."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    with downloads_as_before():
        disable_progress_bars()
        yield


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit hash (40 hexadecimal digits), not a branch or tag."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def fetch(repository: str, revision: str | None, choose: Choose) -> Path:
    """Return the local folder of `repository` at one commit; the folder's name is the commit hash.

    `choose` receives the names of all files and returns the required ones; it raises WeightsError if any is
    missing. Files that are not in the cache are downloaded, with the hub's progress bar on stderr. Raises
    WeightsError, with a specific message for an unknown or gated repository, an unknown revision, an unreachable
    hub, and an interrupted download.
    """
    from huggingface_hub import HfApi

    cached = _cached(repository, revision, choose)
    if cached is not None and is_commit(revision):
        return cached
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=SECONDS)
    except Exception as error:  # the hub client raises its own, httpx's and the system's types
        if cached is not None and not _is_missing_revision(error):
            return cached
        raise WeightsError(
            _refusal(repository, revision, error, _missing(repository, revision, choose))
        ) from error
    wanted = choose([file.rfilename for file in info.siblings or []])
    if cached is not None and cached.name == info.sha and {*wanted} <= {*names_in(cached)}:
        return cached
    return _download(repository, revision, wanted)


def _cached(repository: str, revision: str | None, choose: Choose) -> Path | None:
    """The cached folder of a revision if it holds all required files. Makes no request."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[])
        choose(names_in(Path(folder)))
    except Exception:  # not in the cache, or incomplete
        return None
    return Path(folder)


def _missing(repository: str, revision: str | None, choose: Choose) -> str:
    """The required files that are not in the cache, as `choose` names them. Makes no request."""
    from huggingface_hub import snapshot_download

    try:
        names = names_in(Path(snapshot_download(repository, revision=revision, local_files_only=True)))
    except Exception:  # nothing of it is in the cache
        names = []
    try:
        choose(names)
    except WeightsError as error:
        return str(error).rpartition("missing: ")[2]
    return ""


def names_in(folder: Path) -> list[str]:
    """Every file below a folder, as a relative path with forward slashes."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _download(repository: str, revision: str | None, wanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Path(snapshot_download(repository, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # as above
        if _status(error) is not None:
            raise WeightsError(_refusal(repository, revision, error)) from error
        raise WeightsError(
            f"the download of '{repository}' was interrupted ({_first_line(error)}); run the same command again: "
            "complete files are kept, the interrupted one restarts from its beginning"
        ) from error


def _refusal(repository: str, revision: str | None, error: Exception, missing: str = "") -> str:
    """The message to the user for an error of the hub client; `missing` names files."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, HFValidationError):
        return f"'{repository}' is neither a folder on this machine nor a hub id (OWNER/NAME)"
    if isinstance(error, GatedRepoError):
        return _gated(repository, page, _status(error))
    # Without a token the hub answers 401 for private and for missing repositories.
    if isinstance(error, RepositoryNotFoundError) or (_status(error) == 401 and get_token() is None):
        return (
            f"{constants.ENDPOINT} has no repository '{repository}' that you may read; check the id, or, if it is "
            "private, set HF_TOKEN to a token of an account that may read it"
        )
    if _is_missing_revision(error):
        return f"'{repository}' has no revision '{revision}'; {_revisions(repository)}"
    return _no_answer(repository, revision, error, missing)


def _gated(repository: str, page: str, status: int | None) -> str:
    if status == 403:
        return (
            f"'{repository}' is gated, and the account of HF_TOKEN has not accepted its terms; accept them at "
            f"{page}"
        )
    return (
        f"'{repository}' is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account "
        "(https://huggingface.co/settings/tokens)"
    )


def _no_answer(repository: str, revision: str | None, error: Exception, missing: str) -> str:
    from huggingface_hub import constants

    status, endpoint = _status(error), constants.ENDPOINT
    what = f"'{repository}'" if revision is None else f"'{repository}' at revision {revision}"
    if status in (401, 403):
        return f"{endpoint} refuses HF_TOKEN ({status}) for {what}; set it to a valid token, or unset it"
    if type(error).__name__ == "OfflineModeIsEnabled":
        reason = "is not contacted, because HF_HUB_OFFLINE is set"
    else:
        reason = (
            f"cannot be reached ({type(error).__name__})" if status is None else f"answers with error {status}"
        )
    files = f" (missing: {missing})" if missing else ""
    at = "" if revision is None else f" --revision {revision}"
    return (
        f"{what} is not in the cache {constants.HF_HUB_CACHE}{files}, and {endpoint} {reason}; connect to the "
        f"network once, or run 'hf download {repository}{at}' on another machine and copy the folder "
        f"models--{repository.replace('/', '--')} of its cache here, or give a local path"
    )


def _revisions(repository: str) -> str:
    """The branches and tags of a repository, for a message."""
    from huggingface_hub import HfApi

    names: list[str] = []
    with contextlib.suppress(Exception):  # the message is correct without them
        refs = HfApi().list_repo_refs(repository)
        names = [ref.name for ref in [*refs.branches, *refs.tags]]
    return f"there is: {', '.join(names)}, or a commit hash" if names else "give a branch, a tag or a commit hash"


def _is_missing_revision(error: Exception) -> bool:
    from huggingface_hub.errors import RevisionNotFoundError

    return isinstance(error, RevisionNotFoundError)


def _status(error: Exception) -> int | None:
    """The HTTP status of a refusal; None if the hub did not answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
