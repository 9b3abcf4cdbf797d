"""What is installed: every package of the source tree, or an import works in a checkout and nowhere else."""

from __future__ import annotations

import re
from configparser import ConfigParser

from hpcprune.native.compiling import kernel_sources
from tests.conftest import ROOT


def test_every_package_is_installed() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    there = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "hpcprune").rglob("__init__.py")}
    assert there <= listed


def test_every_source_of_the_kernels_is_installed_with_what_it_includes() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    kernels, patterns = ROOT / "kernels", re.split(r",\s*", setup["options.package_data"]["hpcprune.kernels"])
    installed = {file.resolve() for pattern in patterns for file in kernels.glob(pattern)}
    for suffix in (".cpp", ".cu"):
        sources, headers = kernel_sources(suffix)
        assert set(sources) <= installed and set(headers) <= installed
        for file in (*sources, *headers):
            for name in re.findall(r'#include "(.+)"', file.read_text()):
                found = [folder / name for folder in (file.parent, kernels) if (folder / name).exists()]
                assert found and found[0].resolve() in headers, f"{file}: {name} is no header that a cache looks at"
