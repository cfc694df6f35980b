#!/bin/bash
# The part of files.sh that runs in the test machine.
set -uo pipefail
disk=/dev/sda
volume=lab/sda
export B2_REPOSITORY=/root/repo B2_CACHE_DIR=/root/cache

say() { echo "== [$(cut -d' ' -f1 /proc/uptime)] $*"; }
fail() { echo "FAILED: $*"; exit 1; }
check() { "$@" || fail "$*"; }
quiet_lvm=(--config 'global{thin_check_executable=""}')
# Everything that a copy of a volume group could disturb.
state() {
  dmsetup table --showkeys | sort
  dmsetup info -c --noheadings -o name,uuid,open | sort
  vgs --noheadings -o vg_name,vg_uuid,vg_attr
  lvs --noheadings -a -o lv_name,lv_attr
  pvs --noheadings -o pv_name,pv_uuid,vg_name
}
loops() { losetup --list --noheadings | wc -l; }
# shellcheck disable=SC2317 # called by eventually
is_gone() { ! kill -0 "$1" 2>/dev/null && ! mountpoint -q /mnt/b2 && [ "$(loops)" = "$loops_before" ]; }
eventually() {
  for _ in $(seq 150); do
    "$@" && return
    sleep .2
  done
  fail "not within thirty seconds: $*"
}

say "$(uname -r), $(lvm version | head -n 1)"
check ln -s /project/bin/b2 /usr/local/bin/b2
printf 'label: gpt\nsize=180M\nsize=180M\n' | sfdisk -q $disk
udevadm settle
check pvcreate -q ${disk}1 ${disk}2
check vgcreate -q labvg ${disk}1 ${disk}2
check lvcreate -q -y -L 40M -n root labvg ${disk}1
check lvcreate -q -y -i 2 -I 64k -L 40M -n striped labvg
check lvextend -q -L 60M labvg/root ${disk}2
check lvcreate -q -y --type raid1 -m 1 -L 24M -n mirrored labvg
check lvcreate -q -y "${quiet_lvm[@]}" -L 40M -T labvg/pool -V 64M -n thin
for name in root striped mirrored thin; do
  check mkfs.ext4 -q "/dev/labvg/$name"
  mkdir -p "/mnt/$name"
  check mount "/dev/labvg/$name" "/mnt/$name"
  seq 1 100000 | sed "s/^/$name /" >"/mnt/$name/numbers"
  head -c 6000000 /dev/urandom >"/mnt/$name/random"
done
sync
check lvcreate -q -y -L 16M -s -n snap labvg/root
seq 200000 300000 >/mnt/root/numbers
echo 'in the journal only' >/mnt/root/late
sync -f /mnt/root
python3 -c 'import os; f = os.open("/mnt/striped/late", os.O_WRONLY | os.O_CREAT); os.write(f, b"fsynced\n"); os.fsync(f)'
sync
check b2 --quiet init --encryption none
check b2 --quiet snapshot $disk --volume $volume --class crash
state >/root/before
loops_before=$(loops)

say "ls and cat, with the same volume group active here"
b2 --json ls $volume >/root/ls 2>/root/ls.err || true
cat /root/ls.err
for name in root striped; do
  grep -q "\"name\":\"labvg/$name\"" /root/ls || fail "labvg/$name is not listed: $(cat /root/ls)"
  check b2 --quiet restore $volume "/root/out-$name" --path "labvg/$name:/"
  check diff -r --exclude=lost+found "/root/out-$name" "/mnt/$name"
done
b2 --quiet cat "$volume:labvg/striped:/late" | cmp - /mnt/striped/late || fail "cat"
state | diff /root/before - || fail "LVM of this machine is not what it was"

say "what only LVM can read is refused with the reason"
b2 cat "$volume:labvg/thin:/numbers" >/dev/null 2>/root/refused
code=$?
cat /root/refused
[ $code -ne 0 ] || fail "labvg/thin was read"
grep -q 'labvg/thin: it is of type thin' /root/refused || fail "no reason"
grep -q 'labvg/snap: it is a snapshot' /root/refused || fail "no reason for the snapshot"

say "mount --files"
mkdir -p /mnt/b2
for way in umount KILL; do
  b2 --json mount /mnt/b2 --volume $volume --files --log /root/mount.log >/root/mounted || fail "mount: $(cat /root/mounted)"
  pid=$(sed -n 's/.*"pid":\([0-9]*\).*/\1/p' /root/mounted)
  for name in root striped; do
    for file in numbers random late; do
      check cmp "/mnt/b2/latest/labvg/$name/$file" "/mnt/$name/$file"
    done
  done
  shown=$(cd /mnt/b2/latest/labvg && echo *)
  [ "$shown" = 'root striped' ] || fail "shown are: $shown"
  udevadm settle
  state | diff /root/before - || fail "LVM of this machine is not what it was, while mounted"
  if [ $way = umount ]; then check b2 --quiet umount /mnt/b2; else kill -$way "$pid"; fi
  eventually is_gone "$pid"
  say "ended by $way: nothing is left"
done
grep 'only LVM itself' /root/mount.log | head -n 1
grep -q 'only LVM itself' /root/mount.log || fail "the log does not say what is left out"
udevadm settle
state | diff /root/before - || fail "LVM of this machine is not what it was in the end"
(cd /mnt && sha256sum root/{numbers,random,late} striped/{random,late} mirrored/{numbers,random} thin/{numbers,random}) |
  sed 's|  \([a-z]*\)/| \1:/|' >/lab/sums
mkdir -p /mnt/snap && mount -o ro,noload /dev/labvg/snap /mnt/snap && (cd /mnt && sha256sum snap/numbers) | sed 's|  snap/| snap:/|' >>/lab/sums
sync
say "all is well"
exit 0
