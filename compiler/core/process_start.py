"""Start of a process, by which its id is told from that of a later one."""

import subprocess
from pathlib import Path


def process_start_text(pid: int) -> str:
    """When a process began, in the system's own words; "" where there is none that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    if Path("/proc/self").exists():
        return ""
    completed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return completed.stdout.strip()
