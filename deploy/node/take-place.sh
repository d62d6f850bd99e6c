#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# In a node image of kind or minikube, after deploy/install.sh: have cri-server stand where containerd stood.
#
#   containerd.service   our unit under that name, since the kubelet (--runtime-cgroups), kind and minikube know it;
#                        cri-server.service is another name for it
#   containerd, ctr      stand-ins for what kind and minikube call; the real ones move to /opt/cri-server/replaced
#   containerd's store   goes: what was in it is in /opt/cri-server/images.tar, if anything was
#
# DESTDIR: the image's root, if it is not /.  Units are enabled by their links: no systemd runs in a build.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=${DESTDIR:-}
units=$root/etc/systemd/system
replaced=$root/opt/cri-server/replaced

place() {
    for folder in /usr/local/bin /usr/bin; do
        [ ! -e "$root$folder/$1" ] || { echo "$root$folder/$1"; return; }
    done
    echo "take-place: $1 is not in this image: is it a node image?" >&2
    exit 1
}

mkdir -p "$replaced"
for program in containerd ctr; do
    [ ! -e "$replaced/$program" ] || continue
    at=$(place $program)
    mv "$at" "$replaced/$program"
    install -m 755 "$here/$program" "$at"
done

install -D -m 644 "$here/config.toml" "$root/etc/cri-server/config.toml"
printf 'runtime-endpoint: unix:///run/containerd/containerd.sock\n' >"$root/etc/crictl.yaml"
rm -f "$units/containerd.service" "$units/cri-server.service"
install -m 644 "$here/../cri-server.service" "$units/containerd.service"
ln -s containerd.service "$units/cri-server.service"
install -m 644 "$here/cri-server-images.service" "$units/"
install -D -m 644 "$here/20-cri-server.conf" "$units/kubelet.service.d/20-cri-server.conf"

mkdir -p "$units/multi-user.target.wants"
for unit in containerd.service cri-server-images.service; do
    ln -sf "../$unit" "$units/multi-user.target.wants/$unit"
done
# minikube's image starts these, each of which wants containerd behind its socket.
for unit in docker.service docker.socket cri-docker.service cri-docker.socket buildkit.socket nerdctl.socket crio.service; do
    rm -f "$units"/*.wants/"$unit"
done
rm -rf "$root/var/lib/containerd"
