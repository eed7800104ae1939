"""What a toy kind imports beforehand: leaves the process id in the file that BALLAST names, and prints a line."""

import os
import sys
import time

IMPORTED = time.time()
sys.stdout.write(f"ballast for {os.environ.get('WORD', 'nobody')}\n")
sys.stdout.flush()
if "BALLAST" in os.environ:
    with open(os.environ["BALLAST"], "a") as file:
        file.write(f"{os.getpid()}\n")
