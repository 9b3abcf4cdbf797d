"""The errors a user may see.

Each says what was given, what is allowed and what to do, in one line: the command line prints it as it is, without a
traceback, and exits with `exit_code`. Anything else that is raised is a defect of ours (or of the user's own code) and
is shown with its traceback.
"""

from __future__ import annotations

import json

__all__ = [
    "GOING_ON",
    "CheckpointError",
    "GoalError",
    "HpcpruneError",
    "JobError",
    "NumericsError",
    "TaskError",
    "ThresholdError",
    "WeightsError",
    "WorldError",
    "short",
    "show",
]


# The end of the message of a run that diverged: what its user would change is part of what the job is.
GOING_ON = (
    "The last checkpoint, if there is one, is kept, and the same command goes on from it. A changed job needs a folder "
    "of its own (--out), and can begin with this one's dense network, once there is one (weights: its dense.h5)"
)


class HpcpruneError(Exception):
    """Base of all errors that hpcprune raises on purpose."""

    exit_code = 2


class JobError(HpcpruneError):
    """The job file, an override, the command line or the output folder is not usable."""


class TaskError(HpcpruneError):
    """The user's task file cannot be loaded, or what it gives is not a model and data."""


class GoalError(HpcpruneError):
    """A run has ended, and no network that it made meets the goal of `prune.until`."""

    exit_code = 3


class WeightsError(HpcpruneError):
    """The dense weights cannot be read, or do not fit the model."""


class NumericsError(HpcpruneError):
    """A weight, a score or a loss is NaN or infinite."""


class ThresholdError(HpcpruneError, ValueError):
    """k, or the arrays of scores, are not usable."""


class CheckpointError(HpcpruneError):
    """A checkpoint is damaged, hostile, of a newer format, or not a checkpoint."""


class WorldError(HpcpruneError):
    """The ranks are not what the launcher promised, or some of them did not arrive."""


def show(value: object) -> str:
    """A value as an error shows it: on one line, nearly as YAML would be written, cut where it is long."""
    try:
        return short(json.dumps(value, ensure_ascii=False, default=str))
    except ValueError:
        return "a value that holds itself"


def short(value: object) -> str:
    """A text as an error quotes it: on one line, cut where it is long."""
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else text[:97] + "..."
