"""``python -m jaxpeft.testing``: the contract suite for one method."""

import sys

from jaxpeft.testing._command import main

if __name__ == "__main__":
    sys.exit(main())
