"""Checks of a wheel that a cross compiler made: its tag, and that its library is one for 64-bit ARM.

`make wheel-aarch64` runs it, with the standard library alone.
"""

import struct
import sys
from pathlib import Path
from zipfile import ZipFile

AARCH64 = 183  # EM_AARCH64 of elf.h


def main(path: Path) -> None:
    assert path.name.endswith("-py3-none-linux_aarch64.whl"), path.name
    with ZipFile(path) as wheel:
        libraries = [name for name in wheel.namelist() if name.endswith(".so")]
        assert libraries == ["effc/kernels/libeffc_kernels.so"], libraries
        content = wheel.read(libraries[0])
    machine = struct.unpack_from("<H", content, 18)[0]
    assert content[:5] == b"\x7fELF\x02" and machine == AARCH64, f"machine {machine} in {libraries[0]}"
    assert b"effc_machine_level" in content, f"{libraries[0]} exports no level"
    print(f"{path}: {len(content)} bytes of kernels for 64-bit ARM")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
