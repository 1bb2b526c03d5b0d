"""Run by path: writes conversations by chat templates, a request in a line of JSON and its answer in another.

A template came with a model, from anybody. transformers runs it in Jinja's sandbox, which keeps it from Python, but not
from taking all time and memory, some of that within a single operation that nothing in Python can stop. So it runs
here, where the kernel stops it: by a timer of processor time that ends the process, and a limit of its memory.
"""

import contextlib
import json
import signal
import sys

TEXT = 16 << 20  # characters of a conversation
MEMORY = 512 << 20  # bytes, beyond what the libraries take


def main() -> None:
    seconds = float(sys.argv[1])
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_process_memory()
    for line in sys.stdin:
        request = json.loads(line)
        _limit_time(seconds)
        try:
            texts = render_jinja_template(conversations=[request.pop("messages")], **request)[0]
            (text,) = list(texts)
            answer = (
                {"text": text}
                if len(text) <= TEXT
                else {"error": f"it writes more than {TEXT >> 20} million characters"}
            )
        except MemoryError:
            answer = {"error": f"it takes more than {MEMORY >> 20} MiB of memory"}
        except RecursionError:
            answer = {"error": "it calls itself without end"}
        except Exception as error:
            answer = {"error": str(error)[:500] or type(error).__name__}
        _limit_time(0)
        print(json.dumps(answer), flush=True)


def _limit_time(seconds: float) -> None:
    """End the process after so much of its time: even an operation that never returns to Python; 0: no longer."""
    with contextlib.suppress(AttributeError):  # a system without timers
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_process_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError, StopIteration):  # a system that counts otherwise
        import resource

        with open("/proc/self/status") as status:
            data_bytes = int(next(line for line in status if line.startswith("VmData")).split()[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes + MEMORY, data_bytes + MEMORY))


if __name__ == "__main__":
    main()
