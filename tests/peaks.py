"""What tests of memory share; they measure in a process of its own: ``measured(program, arguments)``."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil


def grown(run):
    """Return by how many bytes the resident memory of this process rises, at most, while ``run`` runs."""
    process = psutil.Process()
    before, peak, over = process.memory_info().rss, [0], threading.Event()

    def watch():
        while not over.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    over.set()
    thread.join()
    return peak[0] - before


def measured(program, arguments):
    """Run a program, which finds the arguments as JSON in ``sys.argv[1]``, and return the number that it prints."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
