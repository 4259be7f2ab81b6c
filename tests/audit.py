"""What is locked, looked up by ``pip-audit`` in the database of known vulnerabilities.

::

    make audit

Ends with 1 if one is known for a version in ``requirements-dev.txt``. A package that cannot be looked up, as where an
index is mirrored without its database, is counted and not called sound.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parent.parent / "requirements-dev.txt"


def verdict(report: Mapping[str, Any]) -> tuple[list[str], int]:
    """Lines to print and the exit status, of a report of ``pip-audit --format json``."""
    packages = report["dependencies"]
    found = [
        f"{package['name']} {package['version']}: {known['id']}, fixed in {', '.join(known['fix_versions']) or 'none'}"
        for package in packages
        for known in package.get("vulns", ())
    ]
    looked_up = sum("vulns" in package for package in packages)
    count = f"{looked_up} of {len(packages)} packages could be looked up, {len(found)} known vulnerabilities"
    return [*found, count], int(bool(found))


def main() -> int:
    options = ("--require-hashes", "--disable-pip", "--format", "json", "--progress-spinner", "off")
    ran = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--requirement", LOCK, *options], capture_output=True, text=True
    )
    try:
        lines, status = verdict(json.loads(ran.stdout))
    except (ValueError, KeyError):
        lines, status = [f"not audited: {(ran.stderr.strip().splitlines() or ['pip-audit said nothing'])[-1]}"], 0
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
