"""Expected errors of the flow; like all CliperErrors they end a command with one message and exit code 2."""

from cliper.model.errors import CliperError


class InputError(CliperError):
    """The corpus cannot be listed: missing, empty, unreadable, or with colliding image ids."""


class StorageError(CliperError):
    """A bucket or folder refuses access."""


class RunError(CliperError):
    """The output folder belongs to another run, or is not a run folder."""


class ResourceError(CliperError):
    """The cluster cannot schedule what was asked for."""


class BusyError(ResourceError):
    """The cluster could hold the run, but not next to the other work on it."""


class ImageError(Exception):
    """One image cannot be labeled; it becomes a row whose `error_type` is `kind`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class DatasetError(CliperError):
    """A benchmark's files are missing, short, or not in the layout they are published in."""


class EvaluationError(CliperError):
    """Predictions and ground truth do not fit together, or an evaluation is incomplete."""


class FilterError(CliperError):
    """A row filter names what the run does not have, or is not valid SQL."""


class ExportError(CliperError):
    """A format cannot hold what the run has, or the output belongs to something else."""


class LeaseError(RunError):
    """Another driver works on the run folder, or took it over."""


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
