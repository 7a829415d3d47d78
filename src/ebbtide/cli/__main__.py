"""``python -m ebbtide.cli``: the same as the command ``ebbtide``."""

import sys

from ebbtide.cli import main

sys.exit(main())
