"""python evaluate.py RUN_OR_CHECKPOINT [key=value ...] [--output FOLDER]; also under accelerate launch"""

import sys

from vqgan_accel.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
