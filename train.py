"""accelerate launch train.py CONFIG [key=value ...] [--resume]"""

import sys

from vqgan_accel.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
