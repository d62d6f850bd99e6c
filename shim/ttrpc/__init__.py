# SPDX-License-Identifier: Apache-2.0
"""ttrpc: gRPC's idea on a unix socket with a ten byte header. Interoperates with containerd's."""
