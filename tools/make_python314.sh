#!/usr/bin/env bash
# Makes a Debian sid in a folder, with Python 3.14 and what the tests need; run again, it brings that
# up to date. As root, with debootstrap installed:
#
#   tools/make_python314.sh ROOT [MIRROR]
#
# Then the tests run inside, on a copy of what is committed. All mounts are gone afterwards; the root
# is mounted on itself because some tests mount folders of their own.
#
#   git archive --prefix=taskcarrier/ HEAD | tar --extract --directory=ROOT/srv
#   unshare --mount bash -euc '
#       mount --bind ROOT ROOT
#       for folder in proc sys dev dev/shm; do mount --bind /$folder ROOT/$folder; done
#       chroot ROOT make --directory=/srv/taskcarrier test PYTHON=python3.14'
set -euo pipefail

if [[ $# -lt 1 || $# -gt 2 ]]; then
    echo "usage: $0 ROOT [MIRROR]" >&2
    exit 2
fi
root=$1
mirror=${2:-http://deb.debian.org/debian}
suite=sid

if [[ $EUID != 0 ]]; then
    echo "$0: only root can make a root" >&2
    exit 1
fi
command -v debootstrap >/dev/null || { echo "$0: debootstrap is not installed" >&2; exit 1; }

# A folder beside the root until it is whole: what was cut short is made anew.
if [[ ! -e $root ]]; then
    rm -rf --one-file-system "$root.part"
    debootstrap --variant=minbase "$suite" "$root.part" "$mirror"
    mv "$root.part" "$root"
fi

# Runs a command in the root, with a /proc that is mounted for it alone.
in_root() {
    # shellcheck disable=SC2016  # the inner shell expands it
    unshare --mount bash -euc 'mount -t proc proc "$1/proc"; exec chroot "$@"' - "$root" "$@"
}

# Mirrors may be older than a release file is valid. A compiler is for dependencies without wheels.
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
apt=(apt-get -o Acquire::Check-Valid-Until=false --yes)
in_root "${apt[@]}" update
in_root "${apt[@]}" --no-install-recommends install \
    python3.14 python3.14-venv python3.14-dev ca-certificates g++ git make
in_root python3.14 --version
