#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# In kind's node image, while it is built on: write the images in containerd's store to an archive.  Arguments: the
# archive.  Where there are none (minikube's image) there is none.  Needs no privileges: nothing is unpacked.
set -eu
archive=$1
store=/var/lib/containerd
folder=$(mktemp -d)

mkdir -p "$(dirname "$archive")"
[ -d $store/io.containerd.content.v1.content/blobs ] || { echo "no images in this node image"; exit 0; }

# Its own configuration would have it look for devices and cgroups that a build does not have.
cat >"$folder/config.toml" <<END
version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
root = "$store"
state = "$folder/state"
[grpc]
address = "$folder/containerd.sock"
END
containerd --config "$folder/config.toml" >"$folder/log" 2>&1 &
daemon=$!
trap 'kill $daemon 2>/dev/null; wait $daemon 2>/dev/null; rm -rf "$folder"' EXIT

ask() { ctr --address "$folder/containerd.sock" --namespace k8s.io "$@"; }
tries=0
until ask version >/dev/null 2>&1; do
    tries=$((tries + 1))
    if [ $tries -ge 30 ] || ! kill -0 $daemon 2>/dev/null; then
        echo "export-images: containerd did not start:" >&2
        tail -20 "$folder/log" >&2
        exit 1
    fi
    sleep 1
done

# Names with a digest are those that the import in kind's build made up (import-DATE@sha256:...).
names=$(ask images list -q | grep -v -e '@sha256:' -e '^sha256:' || true)
[ -n "$names" ] || { echo "no names in containerd's store"; exit 0; }
# shellcheck disable=SC2086  # one word for each name
ask images export "$archive" $names
echo "$names"
