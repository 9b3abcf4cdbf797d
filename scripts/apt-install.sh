#!/bin/sh
# Install Debian or Ubuntu packages, as root or through sudo; otherwise say which are missing.
set -eu
if [ "$(id -u)" = 0 ]; then
    as_root=
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root=sudo
else
    echo "missing packages: $*. Ask an administrator for: apt install $*" >&2
    exit 1
fi
$as_root apt-get update -qq
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -qq -y --no-install-recommends "$@"
