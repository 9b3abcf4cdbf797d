#!/bin/sh
# Make a virtual environment with hpcprune and some of its extras: setup.sh PYTHON FOLDER EXTRAS
set -eu
python=$1 folder=$2 extras=$3

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "hpcprune needs Python 3.10 or newer; $python is $("$python" --version 2>&1). Try: make PYTHON=python3.11 ..." >&2
    exit 1
fi
if [ ! -x "$folder/bin/pip" ]; then
    "$python" -m venv "$folder" || {
        echo "$python cannot make a virtual environment. On Debian or Ubuntu: apt install python3-venv" >&2
        exit 1
    }
    # What Open MPI wants to be told (see the Makefile), for shells that activate the environment.
    cat >> "$folder/bin/activate" <<'END'

# Added by hpcprune's scripts/setup.sh: root may run Open MPI's mpirun, and there may be more ranks than cores.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
END
fi
"$folder/bin/pip" install --quiet --disable-pip-version-check --editable ".[$extras]"
