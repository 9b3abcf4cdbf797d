"""What is installed: every package of the source tree, or an import works in a checkout and nowhere else."""

from __future__ import annotations

from configparser import ConfigParser

from tests.conftest import ROOT


def test_every_package_is_installed() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    there = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "hpcprune").rglob("__init__.py")}
    assert there <= listed
