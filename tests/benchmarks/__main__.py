"""Runs every `bench_*.py` of this folder and writes the ratios where `book/performance` reads them.

Usage: python -m tests.benchmarks [NAME ...], such as `oracle sparse` for `bench_oracle.py` and `bench_sparse.py` alone:
what the others have measured stays.
"""

import datetime
import importlib
import importlib.metadata
import json
import pathlib
import platform
import sys

from tools.kernel import prepare_environment

HERE = pathlib.Path(__file__).parent
OUTPUT = HERE.parent.parent / "book" / "performance.json"


def processor() -> str:
    """The processor's name where Linux tells it, or the machine's architecture."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(names: list[str]) -> None:
    prepare_environment()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("tensorflow", "keras", "numpy")]
    versions = ", ".join([f"python {platform.python_version()}", *versions])
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    results = []
    for path in sorted(HERE.glob("bench_*.py")):
        if names and path.stem.removeprefix("bench_") not in names:
            continue
        for result in importlib.import_module(f"tests.benchmarks.{path.stem}").results():
            results.append({**result, "measured": f"{today} on {processor()}, with {versions}"})
            print("{ratio_median:.3f} ({ratio_q1:.3f} to {ratio_q3:.3f})  {what}".format(**result), flush=True)
    anew = {result["name"] for result in results}
    kept = [result for result in json.loads(OUTPUT.read_text()) if result["name"] not in anew] if names else []
    OUTPUT.write_text(json.dumps(kept + results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
