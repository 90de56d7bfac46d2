"""Expected errors of the flow; like all CliperErrors they end a command with one message and exit code 2."""

from cliper.model.errors import CliperError


class InputError(CliperError):
    """The corpus cannot be listed: missing, empty, unreadable, or with colliding image ids."""


class StorageError(CliperError):
    """A bucket or folder refuses access."""


class RunError(CliperError):
    """The output folder belongs to another run, or is not a run folder."""


class ResourceError(CliperError):
    """The cluster cannot provide the requested resources."""


class BusyError(ResourceError):
    """The cluster is large enough for the run, but other work uses the resources."""


class ImageError(Exception):
    """One image cannot be labeled; it becomes a row whose `error_type` is `kind`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class DatasetError(CliperError):
    """A benchmark's files are missing, incomplete, or not in the published layout."""


class EvaluationError(CliperError):
    """Predictions and ground truth do not match, or an evaluation is incomplete."""


class FilterError(CliperError):
    """A row filter names an unknown class, status or column, or is not valid SQL."""


class ExportError(CliperError):
    """The export format cannot represent the run, or the output folder holds other files."""


class MissingExtraError(CliperError):
    """A library of one of the package's extras is not installed."""


class LeaseError(RunError):
    """Another driver holds the lease of the run folder, or has taken it over."""


class TooManyFailuresError(CliperError):
    """More images failed than --max-failures allows; the commands exit with code 1."""


class ReviewError(CliperError):
    """A reviewed file does not fit the run, or two runs cannot be compared."""


def text_of(error: BaseException) -> str:
    """The text of any error, as valid Unicode: one whose own text cannot be made has a text all the same."""
    try:
        text = str(error)
    except Exception:
        text = f"{type(error).__name__}, whose text cannot be made"
    return text.encode("utf-8", "replace").decode()
