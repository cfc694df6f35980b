#!/bin/bash
# The part of tape.sh that runs in the test machine.
set -uo pipefail
setup=/project/test/lab/tape-setup.sh
export B2_REPOSITORY=/root/repo B2_PASSWORD='tape lab' B2_CACHE_DIR=/root/cache B2_CONFIG=/dev/null
PATH=/project/bin:$PATH

say() { echo "== [$(cut -d' ' -f1 /proc/uptime)] $*"; }
fail() {
  echo "FAILED: $*"
  dmesg | tail -n 20
  exit 1
}
check() { "$@" || fail "$*"; }
# Expects an exit code.
code() {
  local want=$1 got=0
  shift
  "$@" || got=$?
  [ $got -eq "$want" ] || fail "$* ended with $got, not $want"
}

# The repository that is brought back, as another machine sees it.
back() { B2_CACHE_DIR=/root/back-cache b2 --repo /root/back "$@"; }

say "a repository with a point"
head -c 18M /dev/urandom >/root/one.img
truncate -s 24M /root/one.img
check b2 init
check b2 snapshot /root/one.img --volume lab --name first

small=/root/small.img
head -c 2M /dev/urandom >$small
check b2 snapshot $small --volume small

say "a changer with small cartridges"
nodes=$(bash $setup changer "${TAPE_MIB:-8}" 8) || fail "tape-setup"
read -r tape changer <<<"$nodes"
say "drive $tape, changer $changer"
check mtx -f "$changer" load 1 0
mt -f "$tape" load
mt -f "$tape" status

say "export over several cartridges, by the changer"
check b2 export-tape "$tape" --label LAB --volume lab --changer "$changer" --file-size 3M --pack-size 1M --buffer 16M
check b2 tape list
[ "$(b2 --json tape list | grep -o '"label"' | wc -l)" -ge 3 ] || fail "the set did not span three cartridges"

say "tar reads every file of the last cartridge"
mt -f "$tape" rewind
mt -f "$tape" setblk 0
mkdir -p /root/tar && cd /root/tar || exit 1
files=0
while tar -b 512 -xf "$tape" 2>/run/tar.err; do
  files=$((files + 1))
  [ $files -lt 50 ] || break
  mt -f "$tape" fsf 1 2>/dev/null || break
done
cat /run/tar.err
[ $files -ge 4 ] || fail "tar read $files files only"
check ls b2-tape-LAB-*/README.txt b2-repository/config
cd /root || exit 1

say "a device from tape alone"
check b2 import-tape "$tape" --list
check b2 import-tape "$tape" --to /root/restored.img --changer "$changer"
check cmp /root/one.img /root/restored.img
rm /root/restored.img

say "an incremental session behind the last one"
cp --sparse=always /root/one.img /root/two.img
head -c 1M /dev/urandom | dd of=/root/two.img bs=1M seek=10 conv=notrunc status=none
check b2 snapshot /root/two.img --volume lab
check b2 export-tape "$tape" --label LAB --volume lab --since-last --changer "$changer" --file-size 3M --pack-size 1M --buffer 16M
check b2 tape list --needs lab

say "verify what is in the drive"
check b2 tape verify "$tape"

say "the repository from tapes alone"
check back import-tape "$tape" --changer "$changer"
check back verify --data all
check back restore lab /root/restored.img
check cmp /root/two.img /root/restored.img
check back restore lab /root/restored.img --at first --force
check cmp /root/one.img /root/restored.img
rm -rf /root/restored.img /root/back /root/back-cache

say "an older point behind a newer one, and both from tapes alone"
cp --sparse=always /root/two.img /root/three.img
head -c 1M /dev/urandom | dd of=/root/three.img bs=1M seek=3 conv=notrunc status=none
check b2 snapshot /root/three.img --volume lab
check b2 snapshot /root/two.img --volume lab
for at in '#4' '#3'; do
  check b2 export-tape "$tape" --label LAB --volume lab --since-last --at "$at" --changer "$changer" --pack-size 1M --buffer 16M
done
check back import-tape "$tape" --changer "$changer"
check back restore lab /root/restored.img --at '#3'
check cmp /root/three.img /root/restored.img
check back restore lab /root/restored.img --at '#4' --force
check cmp /root/two.img /root/restored.img
rm -rf /root/restored.img /root/back /root/back-cache

say "an export killed on a fresh cartridge is begun anew"
change() { # $1: slot
  mt -f "$tape" offline
  local loaded
  loaded=$(mtx -f "$changer" status | sed -n 's/.*Storage Element \([0-9]*\) Loaded.*/\1/p')
  [ -z "$loaded" ] || check mtx -f "$changer" unload "$loaded" 0
  check mtx -f "$changer" load "$1" 0
  mt -f "$tape" load
}
change 7
b2 export-tape "$tape" --label KILL --volume lab --pack-size 1M --buffer 16M >/root/kill.log 2>&1 &
exporter=$!
for _ in $(seq 600); do
  # The target keeps the cartridge in a file.
  [ "$(stat -c %s /run/b2tape/B2T007L5)" -ge $((3 * 1024 * 1024)) ] && break
  kill -0 $exporter 2>/dev/null || break
  sleep 0.1
done
kill -9 $exporter || fail "the export was over before it could be killed: $(cat /root/kill.log)"
wait $exporter
b2 --json tape list | grep -o '{[^{]*"KILL-001"[^}]*' | grep -q '"written":""' || fail "the export was finished, or the label is not known: $(b2 --json tape list)"
# The repository knows that nothing on it is needed: no --force, whatever the drive says of the end of data.
check b2 export-tape "$tape" --label KILL --volume small
b2 tape list
check b2 tape verify "$tape"

say "a write-protected cartridge is refused, and left as it was"
change 7
unit() { tgtadm --lld iscsi --mode logicalunit --op update --tid 1 --lun 1 --params "$1"; }
check unit readonly=1
code 1 b2 export-tape "$tape" --label KILL --volume small
code 1 b2 export-tape "$tape" --label KILL --volume small --force
# tgt does not even let the head go forward over a protected cartridge, so that it is read when it no longer is.
check unit readonly=0
check b2 import-tape "$tape" --list
check b2 tape verify "$tape"

say "a foreign cartridge is refused; then fixed blocks on it, through the rewinding node"
change 8
mt -f "$tape" setblk 0
tar -b 64 -cf "$tape" -C /etc hostname
code 1 b2 export-tape "$tape" --label FIX
rewinding=${tape/nst/st}
check b2 export-tape "$rewinding" --label FIX --volume small --fixed-blocks --force --record-size 64K
check b2 tape verify "$rewinding"
check b2 import-tape "$rewinding" --to /root/small.out
check cmp $small /root/small.out

say "no cartridge"
mt -f "$tape" offline
check mtx -f "$changer" unload 8 0
code 4 b2 import-tape "$tape" --list
bash $setup stop
say "ok"
