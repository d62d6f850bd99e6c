# SPDX-License-Identifier: Apache-2.0
"""Images: names, registries, the store of blobs and layers, pulling and collecting.

pull.py ──► registry.py ──► session.py, transfer.py ──► transport.py ──► wire.py
   │             ├── reference.py, documents.py          names and documents, pure
   │             └── hosts.py, auth.py, proxy.py         whom to ask, and as whom
   ├──► manifest.py, store.py                            what an image is; which there are
   └──► layers.py ──► worker.py ──► unpack.py            tar to layer folder
load.py ──► archive.py in registry.py's place            images from files
gc.py ──► store.py                                       what nothing refers to
"""
