# SPDX-License-Identifier: Apache-2.0
"""The per-pod shim: holds what is alive. Budget: under 2 MiB of private memory per pod."""
