#!/bin/bash
# Runs a script as root in a throw-away test machine made by build-image.sh (built now if it is missing or out of date).
#
#   usage: run-in-vm.sh [options] SCRIPT [ARG…]
#     -k qemu|uml     stock Debian kernel in QEMU (default), or the user-mode kernel (near-native speed, one CPU, no SCSI disks)
#     -w              warm start (qemu): go on from a snapshot of the booted machine, made at first use
#     -p DIR          project, read-only in the guest at /project
#     -o DIR          results: the guest's /lab, read and write (default: a temporary one, removed afterwards)
#     -d SIZE|FILE    one more disk: a new sparse one (256M), or the raw image FILE, which is written to. Repeatable.
#                     qemu: /dev/sda, sdb, … (virtio-scsi)    uml: /dev/ubdb, ubdc, …
#     -e NAME=VALUE   environment of the script. Repeatable.
#     -m MIB  -c CPUS  -t SECONDS     default 2048, 2, 600
#     -v DIR          image directory; default ../../node_modules/.cache/b2/lab
#     -l FILE         keep the console's log there
#
# The script's output comes out on stdout; the exit status is the script's own, 124 when the time is up, 125 when the machine
# ended before the script. In the guest, `lab-reboot clean|cut` starts the script again on the same disks with LAB_BOOT=2, …
#
# QEMU emulates (TCG) unless KVM=1 is set: a /dev/kvm that opens is no proof that a stock kernel runs under it.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
kind=qemu warm='' project='' lab='' memory=2048 cpus=2 limit=600 log=''
images=$here/../../node_modules/.cache/b2/lab
disks=() variables=()
usage() {
  sed -n '4,15s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
while getopts k:wp:o:d:e:m:c:t:v:l: option; do
  case $option in
    k) kind=$OPTARG ;;
    w) warm=1 ;;
    p) project=$(realpath "$OPTARG") ;;
    o) mkdir -p "$OPTARG" && lab=$(realpath "$OPTARG") ;;
    d) disks+=("$OPTARG") ;;
    e) variables+=("$OPTARG") ;;
    m) memory=$OPTARG ;;
    c) cpus=$OPTARG ;;
    t) limit=$OPTARG ;;
    v) images=$OPTARG ;;
    l) log=$(realpath -m "$OPTARG") ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || usage
case $kind in qemu | uml) ;; *) usage ;; esac
script=$1
shift
for tool in $([ "$kind" = uml ] || echo qemu-system-x86_64 qemu-img zstd); do
  command -v "$tool" >/dev/null || {
    echo "run-in-vm: $tool is missing: apt-get install --no-install-recommends qemu-system-x86 qemu-utils zstd" >&2
    exit 125
  }
done

mkdir -p "$images"
images=$(realpath "$images")
exec 9>"$images/.lock"
flock 9
if [ "$(cat "$images/stamp" 2>/dev/null)" != "$(cat "$here"/build-image.sh "$here"/guest/* | cksum | cut -d' ' -f1)" ]; then
  echo "run-in-vm: building the image in $images" >&2
  "$here/build-image.sh" "$images" >&2 9>&-
fi
exec 9>&-

work=$(mktemp -d "${TMPDIR:-/tmp}/b2-lab.XXXXXX")
machine='' reader=''
# shellcheck disable=SC2317 # called by the trap
clean_up() {
  [ -z "$machine" ] || kill "$machine" 2>/dev/null || true
  [ -z "$machine" ] || wait "$machine" 2>/dev/null || true
  [ -z "$reader" ] || kill "$reader" 2>/dev/null || true
  rm -rf --one-file-system "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

[ -n "$lab" ] || { lab=$work/lab && mkdir "$lab"; }
[ -n "$project" ] || { project=$work/empty && mkdir "$project"; }
[ -n "$log" ] || log=$work/console.log
: >"$log"
rm -f "$lab/.rc" "$lab/.reboot" "$lab/.boots"
cp "$script" "$lab/.script"
{
  printf 'exec /bin/bash /lab/.script'
  [ $# -eq 0 ] || printf ' %q' "$@"
  echo
} >"$lab/.job"
: >"$lab/.env"
for v in ${variables[@]+"${variables[@]}"}; do printf '%s=%q\n' "${v%%=*}" "${v#*=}" >>"$lab/.env"; done
files=()
for d in ${disks[@]+"${disks[@]}"}; do
  if [[ $d =~ ^[0-9]+[KMGT]$ ]]; then
    truncate -s "$d" "$work/disk${#files[@]}"
    files+=("$work/disk${#files[@]}")
  else
    files+=("$(realpath "$d")")
  fi
done
deadline=$(($(date +%s) + limit))
left() { echo $((deadline > $(date +%s) ? deadline - $(date +%s) : 1)); }

accel=(-accel 'tcg,thread=multi' -cpu "${CPU:-max,-la57,-smap,-smep,-pku}")
[ "${KVM:-}" != 1 ] || accel=(-accel kvm -cpu host)
append="console=ttyS0 quiet mitigations=off panic=-1 audit=0 apparmor=0 selinux=0 cryptomgr.notests random.trust_cpu=1"
append="$append no_timer_check tsc=unstable lab=9p"

# Sets `command`. $1 root disk, $2 and $3 directories shared, $4 and $5 pipes of the go line and of the output, $6 console log.
command=()
# shellcheck disable=SC2054 # QEMU's commas
compose() {
  command=(qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -machine pc "${accel[@]}"
    -m "$memory" -smp "$cpus" -kernel "$images/vmlinuz" -initrd "$images/initrd.img" -append "$append"
    -drive "file=$1,if=none,id=root,cache=unsafe,discard=unmap" -device virtio-blk-pci,drive=root,addr=3
    -device virtio-scsi-pci,id=scsi0,addr=4
    -fsdev "local,id=lab,path=$2,security_model=none,multidevs=remap" -device virtio-9p-pci,fsdev=lab,mount_tag=lab,addr=5
    -fsdev "local,id=project,path=$3,security_model=none,readonly=on,multidevs=remap"
    -device virtio-9p-pci,fsdev=project,mount_tag=project,addr=6
    -device virtio-serial-pci,addr=7
    -chardev "pipe,id=out,path=$5" -device virtserialport,chardev=out,name=lab.out,nr=1
    -chardev "pipe,id=in,path=$4" -device virtserialport,chardev=in,name=lab.in,nr=2
    -device virtio-rng-pci,addr=8 -device vmgenid,guid=auto -serial "file:$6")
}

# Sets `snapshot`: a machine of this image, memory and number of CPUs, frozen when it had booted. Made if there is none.
snapshot=''
need_snapshot() {
  snapshot=$images/snap-$memory-$cpus-$(echo "${accel[*]} $(stat -c %Y "$images/root.raw")" | cksum | cut -d' ' -f1)
  exec 9>"$images/.lock"
  flock 9
  if [ ! -e "$snapshot.state" ]; then
    rm -f "$snapshot".*
    mkdir -p "$work/s"
    mkfifo "$work"/{s.in,s.out,so.in,so.out,monitor.in,monitor.out}
    exec 8<>"$work/monitor.in"
    qemu-img create -q -f qcow2 -F raw -b "$images/root.raw" "$snapshot.qcow2"
    local plain=$append
    append="$append lab.ready"
    compose "$snapshot.qcow2" "$work/s" "$work/s" "$work/s" "$work/so" "$work/snapshot.log"
    append=$plain
    cat "$work/monitor.out" >"$work/monitor.txt" &
    cat "$work/so.out" >"$work/ready" &
    timeout -k 5 600 "${command[@]}" -chardev "pipe,id=monitor,path=$work/monitor" -mon monitor,mode=readline \
      </dev/null 8<&- 9<&- &
    machine=$!
    until grep -q READY "$work/ready" 2>/dev/null; do
      kill -0 "$machine" 2>/dev/null || {
        echo "run-in-vm: the machine to be frozen ended:" >&2
        tail -5 "$work/snapshot.log" >&2
        exit 125
      }
      sleep .2
    done
    sleep 2
    # The monitor answers when it is written. (A machine stopped first would also go on stopped.)
    printf 'migrate "exec:zstd -1 -q > %s.tmp"\ninfo migrate\nquit\n' "$snapshot" >&8
    wait "$machine" || true
    machine=''
    grep -q 'Migration status: completed' "$work/monitor.txt" || {
      echo "run-in-vm: freezing the machine failed:" >&2
      cat "$work/monitor.txt" >&2
      exit 125
    }
    mv "$snapshot.tmp" "$snapshot.state"
    exec 8<&-
  fi
  exec 9>&-
}

# One boot of QEMU, until it ends; $1 counts them. Only the first can be a warm one.
boot_qemu() {
  local incoming=() i f
  if [ "$1" -eq 1 ]; then
    if [ -n "$warm" ]; then
      need_snapshot
      qemu-img create -q -f qcow2 -F qcow2 -b "$snapshot.qcow2" "$work/root.qcow2"
      incoming=(-incoming "exec:zstd -dcq $snapshot.state")
    else
      qemu-img create -q -f qcow2 -F raw -b "$images/root.raw" "$work/root.qcow2"
    fi
  fi
  rm -f "$work"/{go,out}.{in,out}
  mkfifo "$work"/{go.in,go.out,out.in,out.out}
  exec 7<>"$work/go.in"
  # A machine that was frozen has an old clock.
  if [ ${#incoming[@]} -gt 0 ]; then date +"go ${#files[@]} %s.%N" >&7; else echo "go 0" >&7; fi
  compose "$work/root.qcow2" "$lab" "$project" "$work/go" "$work/out" "$log"
  i=0
  for f in ${files[@]+"${files[@]}"}; do
    command+=(-drive "file=$f,format=raw,if=none,id=d$i,cache=unsafe,discard=unmap"
      -device "scsi-hd,bus=scsi0.0,scsi-id=$i,drive=d$i,serial=b2lab$i")
    i=$((i + 1))
  done
  cat "$work/out.out" &
  reader=$!
  timeout -k 10 "$(left)" "${command[@]}" ${incoming[@]+"${incoming[@]}"} </dev/null 7<&- &
  machine=$!
  local status=0
  wait "$machine" || status=$?
  machine=''
  # The reader ends when no writer is left; if QEMU never opened the pipe, this is the writer that goes.
  exec 6<>"$work/out.out" 6<&-
  wait "$reader"
  reader='' && exec 7<&-
  return "$status"
}

boot_uml() {
  local ubd=() i=1 f shm=$work
  for f in ${files[@]+"${files[@]}"}; do
    ubd+=("ubd$i=$f")
    i=$((i + 1))
  done
  # The guest's memory is an unlinked file in TMPDIR: a tmpfs, please.
  [ ! -d /dev/shm ] || shm=/dev/shm
  TMPDIR=$shm timeout -k 10 "$(left)" "$images/linux.uml" "mem=${memory}M" umid=lab "uml_dir=$work/uml" \
    "ubd0=$work/cow,$images/root.raw" ${ubd[@]+"${ubd[@]}"} root=/dev/ubda rw con=null con0=null,fd:2 ssl0=null,fd:1 \
    quiet "lab=hostfs:$lab" "lab.project=$project" </dev/null 2>>"$log" &
  machine=$!
  local status=0
  wait "$machine" || status=$?
  machine=''
  return "$status"
}

# The user-mode kernel reboots within itself; QEMU ends and is started again.
boot=1
while :; do
  status=0
  case $kind in
    qemu) boot_qemu $boot || status=$? ;;
    uml) boot_uml || status=$? ;;
  esac
  if [ ! -e "$lab/.reboot" ] || [ -s "$lab/.rc" ] || [ "$status" -eq 124 ]; then break; fi
  boot=$((boot + 1))
done
[ ! -s "$lab/.rc" ] || exit "$(cat "$lab/.rc")"
[ "$status" -ne 124 ] || { echo "run-in-vm: the time ($limit s) is up" >&2 && exit 124; }
echo "run-in-vm: the machine ended (status $status) before the script did; end of its console:" >&2
tail -n 15 "$log" >&2
exit 125
