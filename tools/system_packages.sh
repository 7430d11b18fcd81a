#!/usr/bin/env bash
# Installs the Debian packages that some tests drive (ssh hosts, Slurm, fault injection), where that needs no question:
# as root, with apt. Elsewhere it says what is missing; the tests that need it are skipped with that reason.
# SYSTEM_PACKAGES=no leaves the system alone.
set -euo pipefail

packages=(iproute2 nftables openssh-client openssh-server strace xfsprogs e2fsprogs munge slurm-client slurmctld slurmd libpmix-dev faketime)

missing=()
if command -v dpkg-query >/dev/null; then
    for package in "${packages[@]}"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
else
    missing=("${packages[@]}")
fi
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || [ "${SYSTEM_PACKAGES:-yes}" = no ]; then
    echo "setup: not installed, so the tests that need them will be skipped: ${missing[*]}"
    exit 0
fi

echo "setup: installing Debian packages for the tests: ${missing[*]}"
# Daemons are installed for the tests to start; none is to start by itself. The policy file says so while apt runs.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
{
    apt-get update -q
    apt-get install -y -q --no-install-recommends "${missing[@]}"
} >/dev/null || echo "setup: apt failed; the tests that need ${missing[*]} will be skipped"
