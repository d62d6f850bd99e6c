#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Take cri-server off this host, as root: end its pods, stop it, remove what it kept, its unit and its program.  May be
# repeated, also after it was interrupted or when the server is broken.  Touches nothing of others: CNI configuration
# and its bridges, other runtimes, the logs of pods, Debian's packages.
#
#   deploy/uninstall.sh [--purge] [--force] [--grace SECONDS] [--config FILE]
#
#   --purge    the configuration too: /etc/cri-server, the unit's drop-ins, /etc/crictl.yaml if it is as we made it
#   --force    although a kubelet is connected
#   --grace    how long a container may take to end (30)
#   --config   of the server, if not /etc/cri-server/config.toml; --purge does not remove it
#   DESTDIR    where install.sh was told to install
set -eu
here=$(cd "$(dirname "$0")" && pwd)
destination=${DESTDIR:-}
program=$destination/opt/cri-server
unit=$destination/etc/systemd/system/cri-server.service
settings=$destination/etc/cri-server/config.toml
purge=no
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { echo "uninstall: $*"; }
die() { echo "uninstall: $*" >&2; exit 1; }

reset=reset
config=
while [ $# -gt 0 ]; do
    case $1 in
        --purge) purge=yes ;;
        --force) reset="$reset --force" ;;
        --grace) [ $# -gt 1 ] || die "--grace needs seconds"; reset="$reset --grace=$2"; shift ;;
        --config) [ $# -gt 1 ] || die "--config needs a file"; config=$2; shift ;;
        *) die "unknown argument $1 (see the head of $0)" ;;
    esac
    shift
done
[ "$(id -u)" = 0 ] || die "needs root"
[ -n "$config" ] || [ ! -e "$settings" ] || config=$settings

systemd() { [ -z "$destination" ] && [ -d /run/systemd/system ]; }

if [ -x "$program/bin/cri-server" ]; then
    # shellcheck disable=SC2086  # one word for each argument
    "$program/bin/cri-server" $reset ${config:+--config "$config"} || die "not finished; what is left is as it was"
else
    say "no program in $program: pods that it left, if any, end with a restart of the host"
fi

remove() {
    [ -e "$1" ] || [ -L "$1" ] || return 0
    rm -rf "$1"
    say "removed $1"
}
if systemd && [ -e "$unit" ]; then
    systemctl --quiet disable cri-server.service
fi
remove "$unit"
remove "$program"
if systemd; then
    systemctl daemon-reload
    systemctl reset-failed cri-server.service 2>/dev/null || true
fi
if [ $purge = yes ]; then
    remove "$destination/etc/cri-server"
    remove "$unit.d"
    if cmp -s "$here/crictl.yaml" "$destination/etc/crictl.yaml"; then
        remove "$destination/etc/crictl.yaml"
    fi
elif [ -e "$settings" ]; then
    say "left $settings (--purge removes it)"
fi
say "done"
