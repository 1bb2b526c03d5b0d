"""Kernels against their targets, as ratios of interleaved calls in one process with cold weights.

    python -m bench.kernels [--only gemv,block,rows,prefill,attention,pack] [--seconds 0.3] [--threads 2]

The same as `effc bench kernels`; compiler/transforms/lowering/racing.py says how samples are taken, compiler/transforms/lowering/kernel_table.py what
is measured.
"""

import sys

from effc.compiler.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *(sys.argv[1:] or ["--threads", "2"])]))
