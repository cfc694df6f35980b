#!/bin/bash
# b2 watch as a service on a stock Debian kernel with real systemd: /dev/sda with LVM on it, rebooted in the middle (cleanly and
# by a cut), a snapshot through the control socket, a logical volume, and an NBD export on the kernel's own client.
#
#   usage: watch-systemd.sh [run-in-vm.sh options]        about five minutes; needs root, the built program and the packages that
#                                                         build-image.sh and run-in-vm.sh name
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
project=${PROJECT:-$here/../..}
[ -e "$project/dist/cli.js" ] || { echo "watch-systemd: build the program first: npm run build" >&2; exit 2; }
exec "$here/run-in-vm.sh" -p "$project" -d 96M -m 2048 -t 3000 "$@" "$here/watch-systemd.guest.sh"
