"""The errors that a caller can act on.

Each message is one line that says the rule, the value that was got, and the remedy.

    PipelineError
    ├── InputError          what was asked for cannot be done: nothing was written        (exit code 2)
    │   ├── ArgumentError   a setting breaks a rule; also a ValueError
    │   ├── ScanError       not a scan, damaged, or of a kind that cannot be read
    │   ├── ModelError      not a model file, damaged, or not fit for this image
    │   ├── StoreError      an image or label volume that is missing, incomplete, or of another run, or a bucket
    │   ├── BudgetError     not even the smallest tile fits the memory budget
    │   └── ClusterError    no scheduler or no worker can be reached, or versions differ
    └── RunError            the run began and did not finish: what was done is kept       (exit code 1)
        ├── QuarantineError some blocks failed again and again; the rest is done
        ├── TakenError      another run is at the same scan
        ├── GivenUpError    the run was cancelled; the same command goes on
        └── StorageError    the disk is full, or storage failed
"""


class PipelineError(Exception):
    """What a caller can act on."""


class InputError(PipelineError):
    """What was asked for cannot be done; nothing was written."""


class ArgumentError(InputError, ValueError):
    """A setting breaks a rule."""


class ScanError(InputError):
    """A path holds no scan, a damaged one, or one of a kind that cannot be read."""


class ModelError(InputError):
    """A file is no model, is damaged, or does not fit the image."""


class StoreError(InputError):
    """An image or label volume is missing, incomplete, or belongs to another run; or a bucket cannot be used."""


class BudgetError(InputError):
    """Not even the smallest tile fits the memory budget."""


class ClusterError(InputError):
    """No scheduler or no worker can be reached, or workers have other versions."""


class RunError(PipelineError):
    """The run began and did not finish; what was done is kept, and the same command goes on."""


class QuarantineError(RunError):
    """Some blocks failed again and again; every other block is done.

    Attributes
    ----------
    causes : of those that failed, by block
    retries : which of the others had to be run again, and why; empty if none
    """

    def __init__(self, message: str, causes: dict[int, str] | None = None, *, retries: str = "") -> None:
        super().__init__(message)
        self.causes, self.retries = causes or {}, retries


class TakenError(RunError):
    """Another run is at the same scan; it will end in the same labels."""


class GivenUpError(RunError):
    """The run was cancelled; what is done is kept, and the same command goes on."""

    def __init__(self, message: str = "the run was cancelled; what is done is kept, the same command goes on") -> None:
        super().__init__(message)


class StorageError(RunError):
    """The disk is full, or storage failed."""
