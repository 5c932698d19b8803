"""Every error that a user or a machine can cause, and the exit code that it ends in.

A text says where, what was found, what is wanted and what to do. Errors are raised low, get their
context once at the edge of a layer, and are printed by the command line alone. What is not listed
here is a bug and keeps its traceback.
"""

from typing import ClassVar


class SparsepruneError(Exception):
    """Base of all errors that are no bugs; `exit_code` is what the process ends with."""

    exit_code: ClassVar[int] = 2


class SparsityError(SparsepruneError, ValueError):
    """The engine was asked for something that S3 does not allow: shapes, budgets, NaN scores."""


class NanScoreError(SparsityError):
    """A score that is NaN: `tensor` names whose, `place` is its index in the view."""

    def __init__(self, tensor: str, place: tuple[int, ...]) -> None:
        super().__init__(f"{tensor}: NaN at {list(place)} has no rank among the scores")
        self.tensor = tensor
        self.place = place


class ShapeMismatchError(SparsityError):
    """A tensor, block or scope does not have the shape that is wanted, or does not divide."""


class CouplingError(SparsityError):
    """Members of a coupling do not align, or one element would belong to two of them."""


class CheckpointError(SparsepruneError):
    """The input is no checkpoint that can be read, or the output may not be written there."""


class SpecError(SparsepruneError):
    """A spec that is wrong in itself or does not fit the checkpoint; `problems` has one line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class CheckFailedError(SparsepruneError):
    """What was to be checked does not hold; the text names every tensor that fails."""

    exit_code = 1


class MachineError(SparsepruneError):
    """Disk full, I/O error, input changed while it was read: the machine, not the request."""

    exit_code = 3
