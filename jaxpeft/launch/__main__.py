"""``python -m jaxpeft.launch``."""

import sys

from jaxpeft.launch import main

sys.exit(main())
