"""`python -m ijepa_enhanced` is `ijepa`."""

import sys

from ijepa_enhanced.cli import main

sys.exit(main())
