"""Exit with 0 if a URL answers, with 1 if not: the health check of containers that have no curl."""

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4


def main() -> int:
    """Ask the URL of the command line, or else of HALOSEG_HEALTH_URL; an image that is given neither is well."""
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("HALOSEG_HEALTH_URL", "")
    if not url:
        return 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S):  # its own errors are for any status but 2xx
            return 0
    except (urllib.error.URLError, OSError) as error:
        sys.stderr.write(f"{url} must answer, got {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
