"""The errors a user may see.

Each says what was given, what is allowed and what to do, in one line: the command line prints it as it is, without a
traceback, and exits with `exit_code`. Anything else that is raised is a defect of ours (or of the user's own code) and
is shown with its traceback.
"""

from __future__ import annotations

__all__ = ["CheckpointError", "HpcpruneError", "JobError", "NumericsError", "TaskError", "WeightsError", "WorldError"]


class HpcpruneError(Exception):
    """Base of all errors that hpcprune raises on purpose."""

    exit_code = 2


class JobError(HpcpruneError):
    """The job file, an override, the command line or the output folder is not usable."""


class TaskError(HpcpruneError):
    """The user's task file cannot be loaded, or what it gives is not a model and data."""


class WeightsError(HpcpruneError):
    """The dense weights cannot be read, or do not fit the model."""


class NumericsError(HpcpruneError):
    """A weight, a score or a loss is NaN or infinite."""


class CheckpointError(HpcpruneError):
    """A checkpoint is damaged, hostile, of a newer format, or not a checkpoint."""


class WorldError(HpcpruneError):
    """The ranks are not what the launcher promised, or some of them did not arrive."""
