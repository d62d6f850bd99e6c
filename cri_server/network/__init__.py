# SPDX-License-Identifier: Apache-2.0
"""Pod networks by CNI: plugins are programs, run in a chain, one chain per network.

cni.py          Network: attach, detach, status; the order of things and the undo
poller.py       asks STATUS in the background
verbs.py        ADD, DEL, CHECK, STATUS, GC, VERSION over a chain
plugin.py       one run of one plugin, and what its failure means
conf.py         /etc/cni/net.d: which file counts, what is in it
cache.py        what was attached, in libcni's place and format
result.py       what ADD answered
attachment.py   what a pod tells the plugins
netns.py        the pinned namespace; made by the shim
"""
