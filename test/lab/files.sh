#!/bin/bash
# Files out of logical volumes on a machine whose own LVM has the very same volume group active: ls, cat, restore --path and
# mount --files read linear and striped volumes without touching it, and name what only LVM can read. That is then read here, out of
# the machine's disk, with the backend vm (thin, raid1, a snapshot) and through mount --files, and compared with what the machine said
# of its files.
#
#   usage: files.sh [run-in-vm.sh options]     some five minutes under emulation; needs root, the built program and the packages
#                                              that build-image.sh and run-in-vm.sh name, and lvm2 for the second part
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
project=$(realpath "${PROJECT:-$here/../..}")
[ -e "$project/dist/cli.js" ] || { echo "files: build the program first: npm run build" >&2; exit 2; }
work=$(mktemp -d "${TMPDIR:-/tmp}/b2-lab-files.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
truncate -s 400M "$work/disk"
"$here/run-in-vm.sh" -p "$project" -o "$work/lab" -d "$work/disk" -m 2048 -t 1800 "$@" "$here/files.guest.sh"

echo "== the same disk here, with the backend vm"
export B2_REPOSITORY=$work/repo B2_CACHE_DIR=$work/cache B2_CONFIG=/dev/null
b2() { node "$project/bin/b2" "$@"; }
b2 --quiet init --encryption none
b2 --quiet snapshot "$work/disk" --volume lab/sda
names='root striped mirrored thin'
b2 --json ls lab/sda:labvg/thin --backend vm | tee "$work/ls" | tail -n 1 | cut -c1-200
for name in $names snap; do
  grep -q "\"name\":\"labvg/$name\"" "$work/ls" || { echo "FAILED: labvg/$name is not listed" >&2; exit 1; }
done
while read -r sum path; do
  found=$(b2 --quiet cat "lab/sda:labvg/$path" --backend vm | sha256sum | cut -d' ' -f1)
  [ "$found" = "$sum" ] || { echo "FAILED: $path has $found, not $sum" >&2; exit 1; }
  echo "$path is what it was"
done <"$work/lab/sums"
echo "== the same through mount --files: LVM in a tiny virtual machine, the kernel here"
mkdir "$work/mnt"
trap 'b2 --quiet umount --lazy "$work/mnt" 2>/dev/null || true; rm -rf --one-file-system "$work"' EXIT
time b2 mount "$work/mnt" --volume lab/sda --files --log "$work/mount.log"
time ls "$work/mnt/latest/labvg"
while IFS=' :' read -r sum name path; do
  found=$(sha256sum <"$work/mnt/latest/labvg/$name$path" | cut -d' ' -f1)
  [ "$found" = "$sum" ] || { echo "FAILED: $name$path has $found, not $sum" >&2; exit 1; }
  echo "$name$path is what it was"
done <"$work/lab/sums"
grep -q 'LVM in a tiny virtual machine puts volumes together' "$work/mount.log"
b2 umount "$work/mnt"
echo "== and checked by verify --fsck"
b2 verify lab/sda --fsck | tee "$work/fsck"
for name in $names snap; do
  grep -q "labvg/$name (ext4) sound" "$work/fsck" || { echo "FAILED: labvg/$name" >&2; exit 1; }
done
echo "== all is well"
