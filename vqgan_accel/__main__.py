"""`python -m vqgan_accel`"""

import sys

from vqgan_accel.cli import main

sys.exit(main())
