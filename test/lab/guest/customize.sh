#!/bin/sh
# Run by mmdebstrap for build-image.sh: turns the installed tree $1 into the guest, with the files of directory $2.
set -e
root=$1
guest=$2

echo b2lab >"$root/etc/hostname"
echo '127.0.0.1 localhost b2lab' >"$root/etc/hosts"
: >"$root/etc/fstab" # the kernel command line names the root
echo 5f7c1bd2a4064a0b9f3f3c6f6c0b2b2b >"$root/etc/machine-id"
install -m755 "$guest/lab-job" "$guest/lab-reboot" "$root/usr/local/sbin/"
install -m644 "$guest/lab.service" "$guest/lab.target" "$root/etc/systemd/system/"
ln -sf lab.target "$root/etc/systemd/system/default.target"

# What the lab starts by itself or does not need at boot.
for unit in tgt.service open-iscsi.service iscsid.service nbd-client.service mdmonitor.service mdcheck_start.timer \
  mdmonitor-oneshot.timer apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
  systemd-timesyncd.service e2scrub_reap.service xfs_scrub_all.timer; do
  chroot "$root" systemctl disable "$unit" >/dev/null 2>&1 || true
done
# Each of these costs seconds under pure emulation.
for unit in getty@tty1.service serial-getty@ttyS0.service getty-static.service systemd-udev-settle.service \
  systemd-logind.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount dev-hugepages.mount dev-mqueue.mount \
  systemd-pstore.service modprobe@efi_pstore.service modprobe@drm.service systemd-update-utmp.service \
  systemd-update-utmp-runlevel.service systemd-network-generator.service systemd-machine-id-commit.service \
  systemd-firstboot.service; do
  ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=persistent\n' >"$root/etc/systemd/journald.conf.d/lab.conf"
printf 'blacklist %s\n' kvm_amd kvm_intel powernow_k8 psmouse pcspkr i2c_piix4 floppy joydev evdev \
  >"$root/etc/modprobe.d/lab.conf"
chroot "$root" passwd -d root >/dev/null

# Modules of the user-mode kernel where modprobe looks for them.
for modules in "$root"/usr/lib/uml/modules/*; do
  [ -d "$modules" ] || continue
  version=${modules##*/}
  ln -sf "../uml/modules/$version" "$root/usr/lib/modules/$version"
  chroot "$root" depmod "$version"
done

# The initrd: a static busybox and the modules of the root disk, uncompressed (quickest under emulation).
version=$(basename "$root"/boot/vmlinuz-*)
version=${version#vmlinuz-}
initrd=$root/tmp/initrd
mkdir -p "$initrd/bin" "$initrd/mod" "$initrd/dev" "$initrd/root"
cp "$root/bin/busybox" "$initrd/bin/busybox"
ln -s busybox "$initrd/bin/sh"
install -m755 "$guest/initrd-init" "$initrd/init"
for module in virtio_pci virtio_blk crc32c_generic ext4; do
  chroot "$root" modprobe -q -S "$version" --show-depends "$module" || true
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r file; do
  name=$(basename "$file")
  case $file in
    *.xz) name=${name%.xz} && xz -dc "$root$file" >"$initrd/mod/$name" ;;
    *.zst) name=${name%.zst} && zstd -qdc "$root$file" >"$initrd/mod/$name" ;;
    *) cp "$root$file" "$initrd/mod/$name" ;;
  esac
  echo "$name" >>"$initrd/mod/order"
done
chroot "$root" sh -c 'cd /tmp/initrd && find . | cpio -o -H newc --quiet >/boot/initrd.img'
rm -rf "$initrd" "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* "$root"/usr/share/man/* \
  "$root"/usr/share/locale/*
