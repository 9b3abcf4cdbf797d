"""The folders of steps on disk: made under a temporary name, given their own once complete, found, and removed.

A step is a folder with one file a rank and an index. Whatever is cut off when, it is complete or absent, and the steps
before it stay.
"""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path

from hpcprune.checkpoint.file import disk_error, sync_folder

__all__ = ["INDEX", "give_name", "prepare_folder", "remove_old", "shard_name", "step_folder", "step_folders"]

INDEX = "index.h5"
_STEP = re.compile(r"step-(\d{8,18})(\.replaced)?")


def shard_name(rank: int) -> str:
    return f"rank-{rank:04d}.h5"


def step_folder(root: Path, step: int) -> Path:
    """Where a step lies once it is complete."""
    return root / f"step-{step:08d}"


def prepare_folder(root: Path, step: int) -> Path:
    """Make a folder for a step to be written into, and remove what was left of steps that were never completed.

    Raises:
        CheckpointError: the folder cannot be made.
    """
    partial = root / f".{step_folder(root, step).name}.{secrets.token_hex(4)}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".step-*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise disk_error(root, error) from error
    return partial


def give_name(partial: Path, target: Path) -> None:
    """Make a folder that has all of its files the step `target`, in the place of one that is there.

    Raises:
        CheckpointError: the disk does not let it; a step that was there stays.
    """
    try:
        sync_folder(partial)
        replaced = target.with_name(f"{target.name}.replaced")
        if target.exists():
            # Between the two renames the old folder is still a step that readers find.
            _remove(replaced)
            target.rename(replaced)
        partial.rename(target)
        sync_folder(target.parent)
        _remove(replaced)
    except OSError as error:
        raise disk_error(target, error) from error


def _remove(folder: Path) -> None:
    """Remove a step's folder so that it is never seen in part."""
    if folder.exists():
        going = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
        folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def remove_old(root: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` of the steps up to number `step`."""
    older = [folder for number, folder in step_folders(root) if number <= step]
    for folder in older[keep:]:
        _remove(folder)


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """The steps in a folder by number, newest first; complete or not is for the reader to find out."""
    found = []
    for folder in root.glob("step-*"):
        match = _STEP.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), match[2] is None, folder))
    return [(number, folder) for number, _, folder in sorted(found, reverse=True)]
