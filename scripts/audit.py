"""Known vulnerabilities of the pinned packages: exit code 1 if there are any, and a line for each.

    python scripts/audit.py

Where the package index serves no advisories (a plain mirror) or does not answer, it says so and ends with
code 0: nothing was found out.
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).parent.parent / "constraints.txt"


def main() -> int:
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--disable-pip",
        "--no-deps",
        "--progress-spinner=off",
        "--format=json",
        "-r",
        str(PINS),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        print(f"not audited, pip-audit failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        return 0
    for package in packages:
        for one in package.get("vulns", []):
            print(f"{package['name']} {package['version']}: {one['id']}, mended in {', '.join(one['fix_versions'])}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    print(f"{len(packages) - len(skipped)} of {len(packages)} packages audited", end="")
    print(f"; the index has no advisories on {', '.join(skipped[:3])} ..." if skipped else "")
    return int(any(package.get("vulns") for package in packages))


if __name__ == "__main__":
    sys.exit(main())
