"""Ctrl-C in real processes: one line and exit code 130, whatever the command is at."""

import os
import signal
import subprocess
import sys
import time

import pytest
from volumes import model_file, scan_file

from pipeline.cli import main
from pipeline.interrupts import INTERRUPTS

LINE = "haloseg: interrupted; what is done is kept: the same command goes on"


def haloseg(at, what):
    """Return a command of haloseg that does something where it begins to import a module."""
    source = f"""
import os, signal, sys, time
class Finder:
    def find_spec(self, name, *rest):
        if name == {at!r}:
            sys.meta_path.remove(self)
            print("now", file=sys.stderr, flush=True)
            {what}
sys.meta_path.insert(0, Finder())
from pipeline.__main__ import main
code = main()
{"" if at else what}
sys.exit(code)
"""
    return [sys.executable, "-c", source]


def lines(process):
    """Return exit code and the lines on stderr but those of progress."""
    told = process.communicate(timeout=60)[1].splitlines()
    return process.returncode, [line for line in told if line.strip() and "blocks" not in line]


def interrupted(command, *, after_s=0.0):
    """Return exit code and lines of a process whose group is sent SIGINT once it says "now"."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    assert process.stderr.readline() == "now\n"
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    end = lines(process)
    until = time.monotonic() + 20
    while left_of(process.pid):
        assert time.monotonic() < until, "processes are left"
    return end


def left_of(group):
    """Whether there are processes of a group."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("at", ["pipeline.cli", "rich.table", "torch.nn", "tensorstore._tensorstore"])
def test_imports_end_in_one_line(tmp_path, at):
    scan_file(tmp_path / "scan.tif", (8, 20, 20))
    command = [*haloseg(at, "time.sleep(0.2)"), "segment", tmp_path / "scan.tif", "--model", "none", "--name", "x"]
    assert interrupted(command) == (130, [LINE])


def test_what_a_library_makes_of_it_ends_in_one_line(tmp_path):
    what = "try: os.kill(os.getpid(), signal.SIGINT)\n            except KeyboardInterrupt: raise ImportError('failed')"
    (tmp_path / "scan.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    command = [*haloseg("h5py", what), "info", tmp_path / "scan.h5::x"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert lines(process) == (130, ["now", LINE])


def test_the_end_keeps_what_is_printed(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    scan_file(tmp_path / "scan.tif", (8, 20, 20))
    command = [*haloseg("", "print('now', file=sys.stderr, flush=True); time.sleep(60)"), "info", tmp_path / "scan.tif"]
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "now\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines(), "[8, 20, 20]" in out) == (130, [LINE], True)


@pytest.mark.parametrize("after_s", [0.0, 2.0])
def test_a_run_on_workers_ends_in_one_line_and_leaves_no_process(tmp_path, after_s):
    scan_file(tmp_path / "scan.tif", (60, 200, 200))
    model = model_file(tmp_path / "model.safetensors")
    segment = ["segment", tmp_path / "scan.tif", "--model", model, "--name", "x", "--workers", "2"]
    assert interrupted([*haloseg("distributed", "pass"), *segment], after_s=after_s) == (130, [LINE])


def test_a_job_in_the_background_goes_on_where_ctrl_c_is_ignored(tmp_path):
    scan_file(tmp_path / "scan.tif", (8, 20, 20))
    command = [*haloseg("zarr", "os.kill(os.getpid(), signal.SIGINT)"), "info", tmp_path / "scan.tif"]
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    process = subprocess.Popen(ignoring, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert lines(process) == (0, ["now"])


def test_a_caller_in_python_keeps_what_ctrl_c_does(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert main(["info", str(tmp_path / "none")]) == 2
    assert "must exist" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGINT), INTERRUPTS.came) == (before, False)
