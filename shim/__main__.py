# SPDX-License-Identifier: Apache-2.0
"""`python -I .../__main__.py zygote FD KIND`: the entry of the zygote, started by `shim.client`.

Run by path, not by module name: in isolated mode (-I) no variable of the environment and no current
directory decides what is imported, only where this file is.
"""

import os
import sys


def main() -> int:
    """Serve forks on the descriptor that is given, for handlers of a kind."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if root not in sys.path:  # a checkout; an installed package is there already
        sys.path.append(root)
    from shim import zygote

    if len(sys.argv) != 4 or sys.argv[1] != "zygote":
        print("usage: shim zygote FD KIND", file=sys.stderr)
        return 2
    zygote.main(int(sys.argv[2]), sys.argv[3])
    return 0


if __name__ == "__main__":
    sys.exit(main())
