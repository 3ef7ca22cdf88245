"""One thread: on networks this small more gain nothing, and waiting costs far more where cores are shared."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
