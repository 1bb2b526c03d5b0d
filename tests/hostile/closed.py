"""Run by path with a folder and a command: the command, where nobody can write to the folder.

As root, whom modes of files don't bind, the folder is mounted to be read alone, in a namespace of this process;
anybody else takes the modes away. Leaves with `UNTRIED` where neither is possible.
"""

import os
import subprocess
import sys
from pathlib import Path

UNTRIED = 77


def main(folder: str, *command: str) -> int:
    if os.getuid() == 0:
        mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" || exit 77; exec "$@"'
        try:
            return subprocess.run(["unshare", "-m", "sh", "-c", mount, folder, *command]).returncode
        except FileNotFoundError:
            return UNTRIED
    paths = [Path(folder), *Path(folder).rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    try:
        for path, mode in modes.items():
            path.chmod(mode & 0o555)
        return subprocess.run(command).returncode
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
