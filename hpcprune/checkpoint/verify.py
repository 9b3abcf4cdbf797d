"""`hpcprune check`: everything about a file, a step or a run's folder that can be verified, a line for each finding."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcprune.checkpoint.format import BLOCK
from hpcprune.checkpoint.pieces import Outline, Piece, check_tensor
from hpcprune.checkpoint.read import open_checkpoint
from hpcprune.checkpoint.resume import check_step
from hpcprune.checkpoint.steps import INDEX, step_folders
from hpcprune.checkpoint.totals import by_kind
from hpcprune.errors import CheckpointError

__all__ = ["Finding", "Report", "print_findings", "verify"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it is right, what it is, and what was found."""

    ok: bool
    path: Path
    text: str

    def line(self) -> str:
        return f"{'ok ' if self.ok else 'BAD'}  {self.text}"


@dataclass
class Report:
    """All findings about a path."""

    path: Path
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def lines(self) -> list[str]:
        """A line for each finding, for people."""
        return [finding.line() for finding in self.findings]

    def as_dict(self) -> dict[str, Any]:
        """The findings as plain values, for JSON."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "findings": [
                {"ok": finding.ok, "path": str(finding.path), "text": finding.text} for finding in self.findings
            ],
        }


def verify(path: str | Path) -> Report:
    """Check a file (model.h5, rank-0000.h5, index.h5), a step's folder, or a run's folder with all that it holds.

    Every byte is read, at most a few chunks are held in memory, and what is damaged does not keep the rest from being
    checked.

    Raises:
        CheckpointError: there is no such path, or nothing there that could be checked.
    """
    path = Path(path)
    try:
        folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror or error}; give a checkpoint file, a step's folder or a run's folder"
        ) from None
    report = Report(path)
    if not folder:
        _look(report, path, check_file)
        return report
    if path.name.startswith("step-") or (path / INDEX).exists():
        _look(report, path, _check_step)
        return report
    model = path / "model.h5"
    if model.exists():
        _look(report, model, check_file)
    for root in (path / "checkpoints", path):
        for _, step in reversed(step_folders(root)):
            _look(report, step, _check_step)
    if not report.findings:
        raise CheckpointError(
            f"{path}: has no model.h5 and no checkpoints/step-*; give a checkpoint file, a step's or a run's folder"
        )
    return report


def print_findings(report: Report, as_json: bool) -> bool:
    """Print a report, for people or as one JSON object; whether all is well."""
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        for line in report.lines():
            print("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line))
    return report.ok


def _look(report: Report, path: Path, check: Callable[[Path], list[str]]) -> None:
    try:
        report.findings.extend(Finding(True, path, f"{path}: {text}") for text in check(path))
    except CheckpointError as error:
        report.findings.append(Finding(False, path, str(error)))


def check_file(path: Path) -> list[str]:
    """Check one file; what was verified, a line each. CheckpointError for the first thing that is wrong."""
    with open_checkpoint(path, "") as file:
        size = file.block.bytes + BLOCK
        lines = [
            f"all {size:,} bytes are there and match their sha256 (format {file.block.format}, kind {file.block.kind})"
        ]
        if file.block.kind == "index":
            outlines = file.outlines()
            lines.append(f"describes {len(outlines)} layers; check the folder for the files that it names")
            return lines
        pieces = file.pieces()
        for piece in pieces:
            if file.block.kind == "model":
                piece.require_whole()
            piece.check()
        lines.append(f"{_totals(pieces)}: masks, values and stated counts agree")
        lines.append(_finite(sum(piece.nonfinite for piece in pieces)))
        nodes = [node for _, node in file.tensor_nodes()] + [node for _, node in file.members("own")]
        total = sum(check_tensor(node) for node in nodes)
        lines.append(f"{len(nodes)} other tensors, {total:,} bytes: types, shapes and values are as stated")
        return lines


def _totals(layers: Iterable[Piece | Outline]) -> str:
    """Of weights, and beside them of a graph's edges."""
    weights, edges = by_kind(layers)
    text = f"{weights.layers} layers, {weights.weights:,} weights, sparsity {weights.sparsity:.2%}"
    return f"{text}; {edges.survivors:,} of {edges.weights:,} edges" if edges.layers else text


def _finite(count: int) -> str:
    return f"{count:,} weights are NaN or infinite, as the file says" if count else "every weight is finite"


def _check_step(path: Path) -> list[str]:
    facts = check_step(path)
    return [
        f"complete: the files of {facts.ranks} ranks, {facts.bytes:,} bytes, match the sha256 that the index gives",
        f"{_totals(facts.layers.values())}: the parts are whole, and masks, values and stated counts agree; "
        f"{facts.tensors} other tensors are as stated",
    ]
