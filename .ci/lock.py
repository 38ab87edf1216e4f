"""`make lock`: write requirements.lock from pip's report of what it would install."""

import json
import sys
from pathlib import Path

report, lock = map(Path, sys.argv[1:])
found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
lines = sorted((f"{each['name']}=={each['version']}" for each in found if each["name"] != "scfm"), key=str.lower)
comments = [line for line in lock.read_text().splitlines() if line.startswith("#")]
lock.write_text("\n".join([*comments, *lines]) + "\n")
print(f"{len(lines)} packages in {lock}")
