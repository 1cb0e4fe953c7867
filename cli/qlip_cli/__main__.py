"""`python -m qlip_cli` is `qlip`; torchrun starts it so on every device."""

import sys

from qlip_cli.main import main

sys.exit(main())
