"""`python -m effc.compiler.driver.workers`: lines of JSON in, lines of JSON out; ends when nobody asks any more."""

import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints does not print into our answers
    from .replica import Replica

    replica = Replica()

    def reply(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    for line in sys.stdin:
        replica.submit(line, reply)
    os._exit(0)  # who asked is gone; what is being computed is of no use


if __name__ == "__main__":
    main()
