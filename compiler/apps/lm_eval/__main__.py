"""The command line of lm-evaluation-harness, with the model `effc`.

python -m effc.compiler.apps.lm_eval --model effc --model_args pretrained=out/model-cpu --tasks arc_easy
"""

import sys

from ....dsl.syntax.diagnostics import Reject
from ....dsl.syntax.render import render
from ...core.environment import check_modules


def main() -> int:
    """Run the harness on the arguments of this process; a mistake about a model is a diagnostic on stderr."""
    try:
        check_modules(["lm_eval"], "eval", "the evaluation harness")
        from lm_eval.__main__ import cli_evaluate

        from . import model  # noqa: F401 (registers `effc`)

        cli_evaluate()
    except Reject as rejection:
        sys.stderr.write(render(rejection.diagnostics) + "\n")
        return rejection.exit
    return 0


if __name__ == "__main__":
    sys.exit(main())
