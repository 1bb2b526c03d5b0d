"""The AMX kernels on an emulated processor: a ROM image in place of a BIOS runs them and prints hashes.

Bochs emulates a Sapphire Rapids, so this shows that the tile instructions do what the model of tiles in
`amx.h` does, bit for bit. It shows nothing of speed, of real hardware, of negative int8 weights (which the
emulator has wrong), or of the permission that `levels.cc` asks Linux for.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from effc.kernels import levels, packed

ROOT = Path(__file__).resolve().parents[2]
SOURCES, IMAGE = ROOT / "kernels" / "src", Path(__file__).parent / "bochs"
KERNELS = set(packed.KINDS) - {"dense_linear_int4"}
COMPILE = ["g++", "-std=c++17", "-O3", "-DNDEBUG", "-Wno-psabi", "-ffp-contract=off", f"-I{SOURCES}"]
# No system is below the image: nothing unwinds, and no check may call a C library.
BARE = [
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-stack-protector",
    "-fno-threadsafe-statics",
    "-fno-pic",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-mno-red-zone",
    "-U_FORTIFY_SOURCE",
    "-U__linux__",
]
DISPLAYS = ("nogui", "sdl2")  # a build from source has the first, Debian's bochs-sdl the second

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def flags(level: str) -> list[str]:
    """What the library's build gives this level."""
    found = re.search(rf"^set\({level}_flags (.*)\)$", (ROOT / "CMakeLists.txt").read_text(), re.M)
    assert found, f"CMakeLists.txt has no flags of {level}"
    whole = re.sub(r"\$\{(\w+)_flags\}", lambda m: " ".join(flags(m[1])), found[1])
    return whole.split()


MODEL = [*flags("amx_model"), "-DEFFC_LEVEL=5", "-DEFFC_LEVEL_NAME=amx_model"]
# Bochs 3.0 takes sttilecfg for an invalid instruction; below the image nobody has tiles to look for.
TILES = [*flags("amx"), "-DEFFC_LEVEL=4", "-DEFFC_LEVEL_NAME=amx", "-DEFFC_ALONE"]


def call(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        **options,
    )


def make(*command: object) -> None:
    done = call(*command)
    assert done.returncode == 0, done.stderr[-4000:]


def compiles_tiles() -> bool:
    return (
        bool(shutil.which("g++"))
        and call(*COMPILE, *TILES, *BARE, "-fsyntax-only", "-x", "c++", os.devnull).returncode == 0
    )


def lacking() -> str:
    """Why no image can be built or run here."""
    for program in ("bochs", "g++", "objcopy"):
        if not shutil.which(program):
            return f"{program} is not installed"
    listed = call("bochs", "--help", "cpu")
    if "sapphire_rapids" not in listed.stdout + listed.stderr:
        return "this bochs has no processor with AMX; version 3.0 has"
    return "" if compiles_tiles() else "g++ can't compile for AMX"


def build(folder: Path) -> None:
    """The ROM image, and beside it the same products over the model of tiles."""
    make(*COMPILE, *TILES, *BARE, "-c", IMAGE / "bare_metal.cc", "-o", folder / "bare_metal.o")
    make(*COMPILE, *MODEL, *BARE, "-c", IMAGE / "packing.cc", "-o", folder / "packing.o")
    for source in ("packed", "levels"):
        make(*COMPILE, *BARE, "-c", SOURCES / f"{source}.cc", "-o", folder / f"{source}.o")
    make(
        "g++",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-T",
        IMAGE / "image.ld",
        *sorted(folder.glob("*.o")),
        IMAGE / "reset.S",
        "-lgcc",
        "-o",
        folder / "image.elf",
    )
    make("objcopy", "-O", "binary", folder / "image.elf", folder / "image.rom")
    assert (folder / "image.rom").stat().st_size == 2 << 20
    (folder / "empty.rom").write_bytes(bytes(512))
    make(
        *COMPILE,
        *MODEL,
        IMAGE / "hosted.cc",
        IMAGE / "packing.cc",
        SOURCES / "packed.cc",
        SOURCES / "threads.cc",
        "-ldl",
        "-lpthread",
        "-o",
        folder / "hosted",
    )


def emulated(folder: Path) -> str:
    """What the image prints."""
    for display in DISPLAYS:
        done = call(
            "bochs",
            "-q",
            "-f",
            IMAGE / "bochsrc",
            f"display_library: {display}",
            cwd=folder,
            env={**os.environ, "SDL_VIDEODRIVER": "dummy"},
        )
        if f"display library '{display}' not available" not in done.stdout + done.stderr:
            log = folder / "bochs.log"
            assert re.search("^end$", done.stdout, re.M), done.stderr[-1000:] + log.read_text()[-3000:]
            return done.stdout
    pytest.skip(f"this bochs has neither display: {', '.join(DISPLAYS)}")


def values(text: str) -> dict[str, str]:
    """Name to hexadecimal number, of those that ended well."""
    return dict(re.findall(r"^(\w+) 0 ([0-9a-f]{16})$", text, re.M))


def test_an_emulated_processor_is_found_to_have_tiles_and_gives_the_bits_of_their_model(tmp_path):
    if reason := lacking():
        pytest.skip(reason)
    build(tmp_path)
    model = values(call(tmp_path / "hosted").stdout)
    assert model.keys() == KERNELS and len(set(model.values())) == len(KERNELS)
    level = levels.CODES["amx"]
    assert values(emulated(tmp_path)) == {"level": f"{level:016x}", **model}


def test_the_int8_tile_products_are_of_unsigned_by_signed_bytes():
    # The emulator takes all bytes for unsigned, so it can't tell this instruction from its three siblings.
    if not compiles_tiles():
        pytest.skip("g++ can't compile for AMX")
    listing = call(*COMPILE, *TILES, "-S", SOURCES / "sparse_linear_int8.cc", "-o", "-").stdout
    assert set(re.findall(r"\btdp\w+", listing)) == {"tdpbusd"}
