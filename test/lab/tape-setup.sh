#!/bin/bash
# Virtual SCSI tapes on the real st driver: tgt as iSCSI target, open-iscsi as initiator, both in the test machine.
#
#   usage: tape-setup.sh start [MIB…]     a drive with one cartridge for each size (default: one of 100 MiB); prints the nodes
#          tape-setup.sh changer MIB N    a drive and a changer with N cartridges; prints "/dev/nst0 /dev/sgX"
#          tape-setup.sh stop
#   env:   TAPE_DIR (files of the cartridges, default /run/b2tape), TAPE_PORT (3260)
#
# What tgt does: variable and fixed blocks of 4 bytes to 1 MiB, file marks, SPACE, REWIND, end of data; writing ends what lay behind. A full
# cartridge fails every other write with ENOSPC, as st does behind the early warning, without a hard end. It has no READ POSITION,
# LOCATE or ERASE.
set -euo pipefail

dir=${TAPE_DIR:-/run/b2tape} port=${TAPE_PORT:-3260} iqn=iqn.2026-01.local.b2:tape
adm() { tgtadm --lld iscsi "$@"; }
unit() {
  local operation=$1
  shift
  adm --mode logicalunit --op "$operation" --tid 1 "$@"
}
cartridge() { tgtimg --op new --device-type tape --barcode "$1" --size "$2" --type data --file "$dir/$1" >/dev/null; }
target() {
  mkdir -p "$dir"
  modprobe -a iscsi_tcp st sg
  setsid tgtd -f --iscsi portal=127.0.0.1:$port >"$dir/tgtd.log" 2>&1 </dev/null &
  echo $! >"$dir/tgtd.pid"
  for _ in $(seq 300); do
    adm --mode sys --op show >/dev/null 2>&1 && break
    sleep 0.1
  done
  adm --mode target --op new --tid 1 --targetname $iqn
}
login() { # $1: drives to wait for
  adm --mode target --op bind --tid 1 --initiator-address 127.0.0.1
  systemctl is-active -q iscsid.socket 2>/dev/null || pidof iscsid >/dev/null || iscsid
  iscsiadm -m discovery -t sendtargets -p 127.0.0.1:$port >/dev/null
  iscsiadm -m node -T $iqn -p 127.0.0.1:$port --login >/dev/null
  udevadm settle 2>/dev/null || true
  for _ in $(seq 300); do
    [ "$(lsscsi -g | grep -c 'IET.*VIRTUAL-TAPE.*/dev/st')" -ge "$1" ] && break
    sleep 0.1
  done
}
drives() { lsscsi | awk '/IET +VIRTUAL-TAPE/ { sub("/dev/st", "/dev/nst", $NF); printf "%s%s", n++ ? " " : "", $NF }'; }

case ${1:-} in
start)
  shift
  [ $# -gt 0 ] || set -- 100
  target
  n=0
  for mib; do
    n=$((n + 1))
    name=$(printf 'B2T%03dL5' $n)
    cartridge "$name" "$mib"
    unit new --lun $n --device-type tape --bstype ssc --backing-store "$dir/$name"
  done
  login $n
  drives
  echo
  ;;
changer)
  mib=$2 slots=$3
  target
  cartridge EMPTY001 1
  for i in $(seq "$slots"); do cartridge "$(printf 'B2T%03dL5' "$i")" "$mib"; done
  unit new --lun 1 --device-type tape --bstype ssc --backing-store "$dir/EMPTY001"
  truncate -s 1M "$dir/smc"
  unit new --lun 2 --device-type changer --backing-store "$dir/smc"
  set_changer() { unit update --lun 2 --params "$1"; }
  set_changer media_home="$dir"
  set_changer element_type=4,start_address=1,quantity=1 # the drive
  set_changer element_type=4,address=1,tid=1,lun=1
  set_changer element_type=1,start_address=16,quantity=1 # the arm
  set_changer element_type=3,start_address=32,quantity=1 # the mail slot
  set_changer element_type=2,start_address=1024,quantity="$slots"
  for i in $(seq "$slots"); do
    set_changer "element_type=2,address=$((1023 + i)),barcode=$(printf 'B2T%03dL5' "$i"),sides=1"
  done
  unit update --lun 1 --params online=0
  unit update --lun 2 --params online=1
  login 1
  echo "$(drives) $(lsscsi -g | awk '/mediumx/ { print $NF }')"
  ;;
stop)
  iscsiadm -m node -T $iqn -p 127.0.0.1:$port --logout >/dev/null || true
  adm --mode target --op delete --force --tid 1 || true
  adm --mode sys --op delete || kill "$(cat "$dir/tgtd.pid")" || true
  ;;
*)
  sed -n '4,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
  ;;
esac
