"""Reopens many artifacts in one fresh process: `reopen_child.py VERIFY_CHILD.py JOBS.json`."""

import json
import os
import runpy
import sys

import torch
from safetensors.torch import load_file, save_file

ORDER = ("plain.py", "export.py", "effc.py", "engine.py")  # what must load without effc comes before effc is imported

if __name__ == "__main__":
    torch.set_num_threads(1)
    names = runpy.run_path(sys.argv[1])
    with open(sys.argv[2], encoding="utf-8") as file:
        jobs = json.load(file)
    for opener, folder, given, outputs in sorted(jobs, key=lambda job: ORDER.index(os.path.basename(job[0]))):
        try:
            model = runpy.run_path(opener)["load"](folder, "")
            save_file(names["probe_model"](model, load_file(given), 3), outputs)
        except Exception as error:  # whatever a model raises; the others are to be seen nevertheless
            with open(f"{outputs}.error", "w", encoding="utf-8") as file:
                file.write(f"{type(error).__name__}: {error}")
