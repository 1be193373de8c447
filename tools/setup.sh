#!/bin/sh
# Installs the Debian packages that building and testing need, where they are missing. Says what it does; does nothing
# where nothing is missing. Needs root, or sudo. `make` itself must be there to get here.
set -eu
packages="gcc g++ libc6-dev libcjson-dev libzip-dev libsentencepiece-dev libpcre2-dev libxxhash-dev libedit-dev \
    libcmocka-dev"
missing=
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "setup: no apt-get here; please install the equivalents of:$missing" >&2
    exit 1
fi
sudo=
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then
        echo "setup: neither root nor sudo; please install:$missing" >&2
        exit 1
    fi
    sudo=sudo
fi
echo "setup: installing$missing" >&2
# shellcheck disable=SC2086
$sudo env DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >&2
