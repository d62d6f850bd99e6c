#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Set up a development tree on Debian 12 or newer, as root: the tools that pods need, .venv, and cri-server in it.
# Quick when all is there already.  Arguments: further commands to provide, from the list below.
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# The package that has a command.
package() {
    case $1 in
        docker-registry | runc | crun | catatonit | iptables | containerd | curl | strace | runsc | shellcheck) echo "$1" ;;
        ip) echo iproute2 ;;
        containerd-shim-runc-v2) echo containerd ;;
        busybox) echo busybox-static ;;
        qemu-system-x86_64) echo qemu-system-x86 ;;
        mmdebstrap) echo mmdebstrap ;;
        mkfs.ext4 | debugfs) echo e2fsprogs ;;
        apparmor_parser) echo apparmor ;;
        python3) echo "python3 python3-venv" ;;
        *) echo "setup.sh: no package is known for $1" >&2; exit 1 ;;
    esac
}

missing() {
    for command in "$@"; do
        command -v "$command" >/dev/null || package "$command"
    done
    # A busybox that needs libraries would not run in an image of its own.
    ! ldd "$(command -v busybox)" >/dev/null 2>&1 || package busybox
    [ -x /usr/lib/cni/bridge ] || [ -x /opt/cni/bin/bridge ] || echo containernetworking-plugins
    [ -n "$(python)" ] || package python3
}

# A Python that is new enough and can make a virtual environment.
python() {
    for candidate in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

# Services that come with the packages are not started: a policy-rc.d of ours says no, for the time of the call.
install() {
    echo "setup: installing $*"
    [ "$(id -u)" = 0 ] || { echo "setup: needs root for: apt-get install $*" >&2; exit 1; }
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap 'rm -f $policy' EXIT INT TERM
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

packages=$(missing runc crun catatonit iptables ip busybox docker-registry curl apparmor_parser "$@" | sort -u)
# shellcheck disable=SC2086  # one word for each package
[ -z "$packages" ] || install $packages

stamp=.venv/.made-from
if ! cmp -s pyproject.toml $stamp || [ ! -x .venv/bin/cri-server ]; then
    echo "setup: making .venv"
    [ -x .venv/bin/python ] || "$(python)" -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]'
    cp pyproject.toml $stamp
fi
