#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Install or upgrade cri-server on Debian 12 or newer, as root, from this checkout.  May be repeated: what an
# administrator may have edited (config.toml, crictl.yaml) is made once and then left alone.  Starts nothing; a server
# that runs is restarted by who decides to (deploy/README.md).
#
#   deploy/install.sh [--no-packages] [--from WHEEL]
#
#   --no-packages   use what is installed, ask apt for nothing
#   --from WHEEL    a wheel in place of this checkout
#   DESTDIR         a folder in place of /, for images and tests; the program then runs from there alone
set -eu
here=$(cd "$(dirname "$0")" && pwd)
destination=${DESTDIR:-}
program=$destination/opt/cri-server
packages=yes
source=$here/..
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { echo "install: $*"; }
die() { echo "install: $*" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
        --no-packages) packages=no ;;
        --from) [ $# -gt 1 ] || die "--from needs a wheel"; source=$2; shift ;;
        *) die "unknown argument $1 (see the head of $0)" ;;
    esac
    shift
done
[ "$(id -u)" = 0 ] || die "needs root"
[ -e "$source" ] || die "$source is not there"

# What pods and the program need, but for what is there already, wherever it came from.
missing() {
    echo python3 python3-venv libstdc++6
    command -v runc >/dev/null || command -v crun >/dev/null || echo runc
    command -v catatonit >/dev/null || echo catatonit
    command -v iptables >/dev/null || echo iptables
    for folder in /opt/cni/bin /usr/lib/cni; do
        for plugin in "$folder"/*; do
            [ ! -x "$plugin" ] || return 0
        done
    done
    echo containernetworking-plugins
}

if [ $packages = yes ]; then
    # shellcheck disable=SC2046  # one word for each package
    set -- $(missing)
    say "packages: $*"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends "$@" >/dev/null
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "python3 is older than 3.11 (Debian 12 has it)"

mkdir -p "$program"
[ -x "$program/bin/pip" ] || python3 -m venv "$program"
pip="$program/bin/pip install --quiet --disable-pip-version-check --no-cache-dir"
$pip --upgrade "$source"
case $source in
    # A wheel of the version that is here already would be skipped, whatever is in it.
    *.whl) $pip --force-reinstall --no-deps "$source" ;;
esac
say "$("$program/bin/cri-server" --version) in $program"

install -D -m 644 "$here/cri-server.service" "$destination/etc/systemd/system/cri-server.service"
for each in config.toml:/etc/cri-server/config.toml crictl.yaml:/etc/crictl.yaml; do
    target=$destination${each#*:}
    if [ -e "$target" ]; then
        say "$target is there: left as it is"
    else
        install -D -m 644 "$here/${each%%:*}" "$target"
    fi
done

if [ -z "$destination" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
say "done; next: $program/bin/cri-server check"
