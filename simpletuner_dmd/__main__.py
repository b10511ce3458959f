"""`python -m simpletuner_dmd` is `simpletuner`."""

import sys

from simpletuner_dmd.cli.main import main

sys.exit(main())
