"""``python -m jaxpeft``: the console script ``jaxpeft``, wherever Python finds it."""

import sys

from jaxpeft.cli import main

if __name__ == "__main__":
    sys.exit(main())
