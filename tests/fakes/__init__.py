# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for what is on the other side of our seams."""
