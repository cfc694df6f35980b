#!/bin/bash
# The part of watch-systemd.sh that runs in the test machine, once after each boot.
set -uo pipefail
# The only SCSI disk: with two of them, which is sda and which sdb may change with each boot.
unit=b2-watch@dev-sda.service
volume=b2lab/sda
disk=/dev/sda
restored=/root/restored.img
log=/root/records.log

say() { echo "== [$(cut -d' ' -f1 /proc/uptime)] $*"; }
fail() {
  echo "FAILED: $*"
  systemctl status --no-pager -l $unit
  journalctl --no-pager -o short-monotonic -u $unit -b | tail -n 60
  exit 1
}
check() { "$@" || fail "$*"; }
property() { systemctl show -p "$1" --value $unit; }

# Appends numbered records with fsync, and logs what was acknowledged on another disk, in sync too (a cut forgets nothing of it).
write_records() {
  cat >/run/records.py <<'PY'
import os,sys,time
f=os.open(sys.argv[1]+'/records',os.O_RDWR|os.O_CREAT|os.O_APPEND,0o600); n=os.fstat(f).st_size//64
log=os.open(sys.argv[2],os.O_WRONLY|os.O_CREAT|os.O_APPEND|os.O_DSYNC,0o600)
while True:
    n+=1; os.write(f,('%d'%n).ljust(63).encode()+b'\n'); os.fsync(f)
    os.write(log,b'%d\n'%n); time.sleep(0.02)
PY
  python3 /run/records.py /mnt/data $log &
  writer=$!
}
stop_writer() {
  kill "$writer"
  wait "$writer" 2>/dev/null
}
mount_data() {
  check vgchange -q -ay vg
  mkdir -p /mnt/data
  check mount /dev/vg/data /mnt/data
}
wait_active() {
  for _ in $(seq 3000); do
    [ "$(property ActiveState)" = active ] && return
    [ "$(property ActiveState)" = failed ] && break
    sleep .2
  done
  fail "$unit is $(property ActiveState)"
}
# Freezes the file system, asks the running watch for a snapshot, copies the disk, and holds the snapshot against it. $1 name
compare_frozen() {
  check fsfreeze --freeze /mnt/data
  local made code
  made=$(b2 --json snapshot $disk --class crash --name "$1")
  code=$?
  dd if=$disk of=/root/frozen.img bs=1M iflag=direct conv=sparse status=none
  check fsfreeze --unfreeze /mnt/data
  [ $code -eq 0 ] || fail "b2 snapshot ended with $code: $made"
  echo "$made"
  rm -f $restored
  check b2 --quiet restore $volume $restored --at "$1" --no-verify
  check cmp $restored /root/frozen.img
  rm -f $restored /root/frozen.img
  say "snapshot $1 is the frozen disk, bit for bit"
}

case $LAB_BOOT in
  1)
    say "$(uname -r), $(systemctl --version | head -n 1), node $(node --version)"
    check ln -s /project/bin/b2 /usr/local/bin/b2
    check cp /project/packaging/systemd/b2-watch@.service /etc/systemd/system/
    check systemctl daemon-reload
    check pvcreate -q $disk
    check vgcreate -q vg $disk
    check lvcreate -q -y -L 64M -n data vg
    check mkfs.ext4 -q /dev/vg/data
    mount_data
    write_records
    say "systemctl enable --now $unit"
    began=$(date +%s)
    check systemctl enable --now $unit
    say "ready after $(($(date +%s) - began)) s: $(property ActiveState), type $(property Type), \"$(property StatusText)\""
    [ "$(property ActiveState)" = active ] || fail "not active"
    check ls -la /run/b2
    [ "$(stat -c %a /run/b2/watch-*.sock)" = 600 ] || fail "the control socket is not 0600"
    check b2 status
    compare_frozen first
    b2 --json snapshot $volume --name best || fail "snapshot of the best class ended with $?"
    check test -s $log
    say "reboot while $(wc -l <$log) records are written"
    lab-reboot clean
    ;;
  2)
    say "the stop at shutdown:"
    journalctl --no-pager -o cat -b -1 -u $unit | tail -n 4
    journalctl --no-pager -o cat -b -1 -u $unit | grep -q "Deactivated successfully" || fail "the service did not end well"
    mount_data
    write_records
    wait_active
    say "exact again: \"$(property StatusText)\""
    compare_frozen second
    # What was acknowledged before the reboot, and before the snapshot, is there: the snapshot was the disk.
    stop_writer
    check umount /mnt/data
    check vgchange -q -an vg
    began=$(date +%s)
    check systemctl stop $unit
    say "systemctl stop: $(($(date +%s) - began)) s, $(property Result), exit code $(property ExecMainStatus)"
    [ "$(property Result) $(property ExecMainStatus)" = "success 0" ] || fail "stop: $(property Result) $(property ExecMainStatus)"
    check b2 --quiet restore $volume $restored --no-verify
    check cmp $disk $restored
    say "after the stop: restored, and it is $disk, bit for bit"
    rm $restored
    say "started with nothing written since the clean stop:"
    check systemctl start $unit
    journalctl --no-pager -o cat -b -u $unit | tail -n 3
    mount_data
    write_records
    sleep 3
    say "cut while $(wc -l <$log) records are written"
    lab-reboot cut
    ;;
  3)
    wait_active
    say "exact again after the cut: \"$(property StatusText)\""
    mount_data
    acknowledged=$(tail -n 1 $log)
    newest=$(($(stat -c %s /mnt/data/records) / 64))
    [ "$newest" -ge "$acknowledged" ] || fail "the disk itself has lost records: $newest of $acknowledged"
    write_records
    compare_frozen third
    stop_writer

    say "a logical volume (bio-based device mapper)"
    b2 --json watch /dev/vg/data --volume lab/lv --interval 500ms >/root/lv.json 2>/root/lv.err &
    watch=$!
    write_records
    for _ in $(seq 3000); do
      grep -q '"coverage":"exact"' /root/lv.json && break
      kill -0 $watch 2>/dev/null || break
      sleep .2
    done
    grep -q '"coverage":"exact"' /root/lv.json || { cat /root/lv.json /root/lv.err; fail "no exact point of the logical volume"; }
    stop_writer
    check umount /mnt/data
    kill -TERM $watch
    wait $watch
    code=$?
    tail -n 1 /root/lv.json | cut -c1-300
    [ $code -eq 0 ] || fail "b2 watch of a logical volume ended with $code: $(cat /root/lv.err)"
    check b2 --quiet restore lab/lv /root/lv.img --no-verify
    check cmp /root/lv.img /dev/vg/data
    say "the logical volume restores bit for bit after $(grep -c '"type":"point"' /root/lv.json) points"

    say "the kernel's NBD client"
    check modprobe nbd
    b2 serve nbd lab/lv --socket /run/export.sock >/root/nbd.log 2>&1 &
    server=$!
    for _ in $(seq 300); do
      [ -S /run/export.sock ] && break
      sleep .2
    done
    check nbd-client -unix /run/export.sock /dev/nbd0 -readonly
    check cmp /dev/nbd0 /dev/vg/data
    mkdir -p /mnt/nbd
    check mount -o ro,noload /dev/nbd0 /mnt/nbd
    [ "$(($(stat -c %s /mnt/nbd/records) / 64))" -ge "$acknowledged" ] || fail "records are missing in the export"
    check umount /mnt/nbd
    check nbd-client -d /dev/nbd0
    kill -TERM $server
    wait $server
    say "the export is the volume, and mounts; serve nbd ended with $?"
    check b2 verify --data all
    say "all is well"
    ;;
esac
exit 0
