#!/bin/bash
# Makes the test machine: a small Debian with systemd and the stock kernel (all its modules), from Debian packages alone.
#
#   usage: build-image.sh [DIR]      (default: ../../node_modules/.cache/b2/lab)
#   env:   SUITE=bookworm|trixie|…   release; default bookworm
#          MIRROR=URL                default: the one apt uses here
#          BACKPORTS=1               kernel of SUITE-backports
#          EXTRA_PKGS="pkg …"        more packages
#          SIZE=4G                   virtual size of the root disk
#          NODE=/path/to/node        copied in; default: the one in PATH
#
# Needs root and the packages mmdebstrap and e2fsprogs. Makes no loop device and leaves no mount behind. QEMU loads kernel and
# initrd by itself, so there is no boot loader. Takes about a minute. In DIR afterwards: root.raw (sparse ext4), vmlinuz,
# initrd.img, config (of the kernel), linux.uml (the same Debian kernel as an ordinary process), build.info, stamp.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
dir=${1:-$here/../../node_modules/.cache/b2/lab}
suite=${SUITE:-bookworm}
mirror=${MIRROR:-$(apt-get indextargets --format "\$(REPO_URI)" | head -n 1)}
node=${NODE:-$(readlink -f "$(command -v node)")}

for tool in mmdebstrap mkfs.ext4; do
  command -v $tool >/dev/null || {
    echo "build-image: $tool is missing: apt-get install --no-install-recommends mmdebstrap e2fsprogs" >&2
    exit 2
  }
done
[ "$(id -u)" -eq 0 ] || { echo "build-image: has to run as root (it makes a chroot)" >&2; exit 2; }

# systemd as init; file systems, LVM and device mapper; SCSI targets, tapes, NBD; libstdc++6 for node.
packages="user-mode-linux systemd systemd-sysv udev dbus kmod procps iproute2 util-linux busybox-static cpio zstd
  e2fsprogs xfsprogs btrfs-progs lvm2 dmsetup mdadm fdisk gdisk tgt open-iscsi mt-st mtx lsscsi sg3-utils fuse3 nbd-client
  strace openssl ca-certificates libstdc++6 liblz4-1 python3-minimal libpython3-stdlib sqlite3 ${EXTRA_PKGS:-}"
sources=("deb $mirror $suite main")
kernel=linux-image-amd64
if [ -n "${BACKPORTS:-}" ]; then
  sources+=("deb $mirror $suite-backports main")
  kernel=linux-image-amd64/$suite-backports
fi

mkdir -p "$dir"
work=$(mktemp -d "${TMPDIR:-/tmp}/b2-lab-image.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
began=$(date +%s)

# Our own small initrd is made by the last hook; the packages would build a big one, slowly.
export INITRD=No
cat >"$work/no-initrd.sh" <<'HOOK'
printf 'do_symlinks=no\ndo_initrd=no\n' >"$1/etc/kernel-img.conf"
HOOK
# shellcheck disable=SC2086 # the list is meant to be split
mmdebstrap --quiet --variant=minbase \
  --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' \
  --include="$(echo $kernel $packages | tr ' ' ',')" \
  --essential-hook="sh $work/no-initrd.sh \"\$1\"" \
  --customize-hook="sh $here/guest/customize.sh \"\$1\" $here/guest" \
  "$suite" "$work/root" "${sources[@]}"
install -m755 "$node" "$work/root/usr/local/bin/node"

cp "$work"/root/boot/vmlinuz-* "$dir/vmlinuz"
cp "$work"/root/boot/config-* "$dir/config"
mv "$work/root/boot/initrd.img" "$dir/initrd.img"
[ ! -e "$work/root/usr/bin/linux.uml" ] || mv "$work/root/usr/bin/linux.uml" "$dir/linux.uml"
rm -f "$dir/root.raw" "$dir"/snap-*
truncate -s "${SIZE:-4G}" "$dir/root.raw"
mkfs.ext4 -q -F -L labroot -m 0 -E lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0 \
  -d "$work/root" "$dir/root.raw"
{
  echo "suite=$suite kernels=$(find "$work/root/lib/modules" -mindepth 1 -maxdepth 1 -printf '%f ')seconds=$(($(date +%s) - began))"
  echo "tree=$(du -sm "$work/root" | cut -f1)MiB root.raw=$(du -m "$dir/root.raw" | cut -f1)MiB"
} | tee "$dir/build.info"
# What run-in-vm.sh needs of the guest side; an image of another state is built anew by its users.
cat "$here"/build-image.sh "$here"/guest/* | cksum | cut -d' ' -f1 >"$dir/stamp"
