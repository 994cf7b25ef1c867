"""What tests of memory share; they measure in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path


def grown(run):
    """Return by how many bytes ``run`` raises this process's own resident memory, by the kernel's high-water mark.

    The mark counts since the process began: ``run`` must need more than anything before it did. Pages of libraries,
    which a forked process maps anew as they are called, are not counted.
    """
    before, mapped = resident("VmRSS"), resident("RssFile")
    run()
    return resident("VmHWM") - before - (resident("RssFile") - mapped)


def resident(field):
    """Return a field of the kernel's account of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def each_measured(program, arguments, *, n_small=0):
    """Run a program, and return the number that its ``measure`` gives for each of the arguments.

    Each in a process of its own, which is forked from one that has imported what the program does and has done nothing
    else: its heap is fresh, and so is the kernel's mark. Where tensors come to lie on it depends on the small objects
    that were there before, which are the same every time, and ``n_small`` thousands more.
    """
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", program + _FORK, json.dumps(arguments), str(n_small)]
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(arguments)
    return [int(line) for line in lines]


_FORK = """
import os
small = [bytes(48) for _ in range(1000 * int(sys.argv[2]))]
for each in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        print(measure(*each), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
