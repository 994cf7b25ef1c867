"""The command ``haloseg`` from its first moment: Ctrl-C ends it in one line while its modules are imported, too."""

from __future__ import annotations

import sys
from importlib import import_module

from pipeline.interrupts import end_at_once


def main() -> int:
    """Run the command line and return its exit code."""
    end_at_once()
    code: int = import_module("pipeline.cli").main()
    return code


if __name__ == "__main__":
    sys.exit(main())
