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

say "a repository with a point"
head -c 18M /dev/urandom >/root/one.img
truncate -s 24M /root/one.img
check b2 init
check b2 snapshot /root/one.img --volume lab --name first

say "a changer with small cartridges"
nodes=$(bash $setup changer "${TAPE_MIB:-8}" 8) || fail "tape-setup"
read -r tape changer <<<"$nodes"
say "drive $tape, changer $changer"
check mtx -f "$changer" load 1 0
mt -f "$tape" load
mt -f "$tape" status

say "export over several cartridges, by the changer"
check b2 export-tape "$tape" --label LAB --changer "$changer" --file-size 3M --pack-size 1M --buffer 16M
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
check b2 export-tape "$tape" --label LAB --since-last --changer "$changer" --file-size 3M --pack-size 1M --buffer 16M
check b2 tape list --needs lab

say "verify what is in the drive"
check b2 tape verify "$tape"

say "the repository from tapes alone"
check b2 --repo /root/back import-tape "$tape" --changer "$changer"
check b2 --repo /root/back verify --data all
check b2 --repo /root/back restore lab /root/restored.img
check cmp /root/two.img /root/restored.img
check b2 --repo /root/back restore lab /root/restored.img --at first --force
check cmp /root/one.img /root/restored.img
rm -r /root/restored.img /root/back

say "a foreign cartridge is refused; then fixed blocks on it, through the rewinding node"
mt -f "$tape" offline
loaded=$(mtx -f "$changer" status | sed -n 's/.*Storage Element \([0-9]*\) Loaded.*/\1/p')
check mtx -f "$changer" unload "$loaded" 0
check mtx -f "$changer" load 8 0
mt -f "$tape" load
mt -f "$tape" setblk 0
tar -b 64 -cf "$tape" -C /etc hostname
code 1 b2 export-tape "$tape" --label FIX
small=/root/small.img
head -c 2M /dev/urandom >$small
check b2 snapshot $small --volume small
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
