# SPDX-License-Identifier: Apache-2.0
"""The CRI server: decides and remembers."""
