"""`python -m tests.accelerator.effc ...`: the command line with the emulated device, `EMULATED_BYTES` of memory on it.

Its last line on stderr is the most that the device held, in bytes.
"""

import os
import sys

from effc.compiler.cli.main import main

from tests.accelerator import emulated

if __name__ == "__main__":
    memory = emulated.device()
    memory.limit(int(os.environ.get("EMULATED_BYTES", 1 << 40)))
    try:
        sys.exit(main())
    finally:
        print(memory.peak(), file=sys.stderr)
