"""The files of a report, each complete or absent."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcprune.errors import JobError
from hpcprune.report.format import Report

__all__ = ["finite", "write_json", "write_text"]


def write_json(report: Report, path: Path) -> None:
    """Write report.json; NaN and infinity, which JSON lacks, become null. Raises JobError if it cannot be written."""
    write_text(path, json.dumps(finite(report), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_text(path: Path, text: str) -> None:
    """All or nothing: a new file beside the old one takes its place when it is whole and on disk."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise JobError(
            f"{path}: cannot be written ({error.strerror}); make room or write elsewhere with --out"
        ) from error
    finally:
        new.unlink(missing_ok=True)
