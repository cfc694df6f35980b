#!/bin/sh
# Installs the system packages that the tests (or, with --bench, the benchmarks) use and that are missing
# here, saying which. Debian and its relatives only, as root; otherwise it names what is missing and goes
# on: tests that need it then say so. Quick when everything is there: one dpkg-query.
#
# usage: setup-system.sh [--bench]
set -eu

# e2fsprogs … ntfs-3g: file systems inside images; fdisk … parted: partition tables; qemu-utils: VM formats; libnbd-bin … openssl: clients of our NBD server;
# rsync acl attr libcap2-bin: what files know, compared; lvm2: logical volumes inside images; liblz4-1: the fast LZ4; libsodium23: the fast scrypt; man-db: checks the man pages; bash zsh fish: completion is tested in each; shellcheck: our scripts;
# make g++ python3: sqlite3 is compiled where its prebuilt cannot be fetched.
packages="rsync acl attr libcap2-bin lvm2 e2fsprogs xfsprogs btrfs-progs dosfstools ntfs-3g fdisk gdisk parted util-linux mount qemu-utils libnbd-bin python3-libnbd nbdkit fio openssl liblz4-1 libsodium23 man-db bash zsh fish shellcheck make g++ python3 procps git qemu-system-x86 linux-image-amd64 busybox-static syslinux syslinux-common mtools ovmf"
what=tests
if [ "${1:-}" = --bench ]; then
  packages="e2fsprogs util-linux liblz4-1 libsodium23 lz4 b3sum openssl time restic borgbackup casync python3-pyfuse3 fuse3 nbdkit libnbd-bin fio"
  what=benchmarks
elif [ $# -gt 0 ]; then
  echo "usage: setup-system.sh [--bench]" >&2
  exit 2
fi

if ! command -v dpkg-query >/dev/null 2>&1; then
  echo "setup-system: not a Debian system; the $what use: $packages" >&2
  exit 0
fi

missing=
# The status of every package that is known; unknown ones are simply not listed.
# shellcheck disable=SC2086 # the list is meant to be split
installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' $packages 2>/dev/null || true)
for package in $packages; do
  if ! printf '%s\n' "$installed" | grep -qxF "$package installed"; then
    missing="$missing $package"
  fi
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
  echo "setup-system: missing for the $what:$missing" >&2
  echo "    sudo apt-get install --no-install-recommends$missing" >&2
  exit 0
fi

echo "setup-system: installing for the $what:$missing" >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A package list may be absent (fresh image) or old (the version it names is gone): one update, one more try.
install() {
  # shellcheck disable=SC2086 # the list is meant to be split
  apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 $missing >"$log" 2>&1
}
if install; then
  exit 0
fi
apt-get update >"$log" 2>&1 || true
if install; then
  exit 0
fi
echo "setup-system: apt-get could not install$missing:" >&2
tail -n 15 "$log" | sed 's/^/    /' >&2
exit 1
