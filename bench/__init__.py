# SPDX-License-Identifier: Apache-2.0
"""What the runtime costs, next to a peer on the same machine in the same run. See
docs/performance.md."""
