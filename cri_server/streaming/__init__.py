# SPDX-License-Identifier: Apache-2.0
"""Exec, attach and port-forward for clients that stay: the HTTP side of the three RPCs."""
