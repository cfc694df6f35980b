#!/bin/bash
# Tapes on the kernel's st driver: a virtual library with small cartridges, so that spanning and the end of tape really happen;
# appending, fixed and variable blocks, tar, verification, a device and a repository from tape alone.
#
#   usage: tape.sh [run-in-vm.sh options]      some ten minutes under emulation; needs root, the built program and the packages
#                                              that build-image.sh and run-in-vm.sh name
#   env:   TAPE_MIB: size of a cartridge (default 8)
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
project=${PROJECT:-$here/../..}
[ -e "$project/dist/cli.js" ] || { echo "tape: build the program first: npm run build" >&2; exit 2; }
exec "$here/run-in-vm.sh" -p "$project" -e "TAPE_MIB=${TAPE_MIB:-8}" -m 2048 -t 2400 "$@" "$here/tape.guest.sh"
