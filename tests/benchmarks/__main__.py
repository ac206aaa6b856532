"""Runs every `bench_*.py` of this folder and writes the ratios where `book/performance` reads them.

Usage: python -m tests.benchmarks
"""

import datetime
import importlib
import importlib.metadata
import json
import pathlib
import platform

from tools.kernel import prepare_environment

HERE = pathlib.Path(__file__).parent
OUTPUT = HERE.parent.parent / "book" / "performance.json"


def processor() -> str:
    """The processor's name where Linux tells it, or the machine's architecture."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    prepare_environment()
    results = []
    for path in sorted(HERE.glob("bench_*.py")):
        for result in importlib.import_module(f"tests.benchmarks.{path.stem}").results():
            results.append(result)
            print("{ratio_median:.3f} ({ratio_q1:.3f} to {ratio_q3:.3f})  {what}".format(**result), flush=True)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": processor(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("tensorflow", "keras", "numpy")},
        "results": results,
    }
    OUTPUT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
