"""What tests of memory share; they measure in a process of its own: ``measured(program, arguments)``."""

import json
import os
import subprocess
import sys
from pathlib import Path


def grown(run):
    """Return by how many bytes ``run`` raises this process's resident memory, by the kernel's own high-water mark.

    The mark counts since the process began: ``run`` must need more than anything before it did.
    """
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field):
    """Return a field of the kernel's account of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measured(program, arguments):
    """Run a program, which finds the arguments as JSON in ``sys.argv[1]``, and return the number that it prints."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
