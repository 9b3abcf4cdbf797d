#!/bin/sh
# Install what slurm/testbed needs, unless it is there.
set -eu
for program in slurmctld slurmd munged ip tc; do
    command -v "$program" >/dev/null || missing=1
done
ls /usr/lib/*/libpmix.so >/dev/null 2>&1 || missing=1
[ -z "${missing:-}" ] ||
    exec sh "$(dirname "$0")/apt-install.sh" slurm-wlm slurm-wlm-basic-plugins munge libpmix-dev iproute2
