# SPDX-License-Identifier: Apache-2.0
"""Images: names, registries, the store of blobs and layers, pulling and collecting.

    pull.py ──► registry.py ──► session.py ──► transport.py    one host ◄─ hosts.py, auth.py, proxy.py
       │            └── reference.py                           names, pure
       ├──► store.py                                           blobs and image records
       └──► unpack.py                                          tar to layer folder
    gc.py ──► store.py                                         what nothing refers to
"""
