"""What every test run shares: its options, the kernels' environment, and the comparison of figures when nbval runs."""

import gc
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from typing import Any

import pytest

from tools import schedule, warm
from tools.figure_data import differences
from tools.kernel import prepare_environment

# Scripts: they look for their team as soon as they are imported.
collect_ignore = ["tests/local_sgd_worker.py", "tests/agreement_worker.py"]
pytest.register_assert_rewrite("tests.kit")
EXAMPLES, EXAMPLES_IF_SLOW = 10, 1000
# Tests run side by side: threads of one only wait for those of others (71 processor seconds became 38 in two files).
ONE_THREAD = ("TF_NUM_INTRAOP_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declares what tools/schedule.py takes."""
    schedule.options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Prepares the environment, what the processes of this run share, the random examples, and nbval."""
    prepare_environment()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, by children too
    if "COMPANION_TESTS_SHARE" not in os.environ:
        os.environ["COMPANION_TESTS_SHARE"] = shared = tempfile.mkdtemp(prefix="companion-tests-")
        config.add_cleanup(lambda: shutil.rmtree(shared, ignore_errors=True))
    config.addinivalue_line("markers", "claim(sentence, chapter): the sentence of the book that this test holds")
    config.addinivalue_line("markers", "slow: one of a whole matrix, for --slow; another case stands for it")
    _take_the_same_examples(EXAMPLES_IF_SLOW if config.getoption("slow") else EXAMPLES)
    starts_the_others = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if starts_the_others:
        os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    gc.set_threshold(100_000, 20, 50)  # Python's own numbers are a search every 700 objects
    if config.getoption("core") and not starts_the_others:
        schedule.start_no_process()
    if config.getoption("record_durations"):
        config.pluginmanager.register(schedule.Recorder())
    if config.getoption("nbval", default=False):
        _compare_figures()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Forks pytest's other processes, too, from one that has imported Keras, which those with notebooks need not."""
    if not config.getoption("nbval", default=False):
        folder = pathlib.Path(os.environ["COMPANION_TESTS_SHARE"])
        for spec in specs:
            spec.python = warm.interpreter(folder, sys.executable, *warm.FOR_TESTS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Chooses what runs, and in which order."""
    schedule.choose(config, items)


@pytest.fixture(autouse=True, scope="module")
def _look_for_garbage_in_what_is_new() -> None:
    """What is there when a module of tests begins is not searched for garbage again: a tenth of all time."""
    gc.collect()
    gc.freeze()


def _take_the_same_examples(count: int) -> None:
    """One profile for all property tests; the Colab run, which has none, has no hypothesis either."""
    try:
        from hypothesis import HealthCheck, settings
    except ImportError:
        return
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors]
    settings.register_profile(
        "ours", max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet
    )
    settings.load_profile("ours")


def _compare_figures() -> None:
    """Lets nbval compare the data of figures, which it would skip as metadata, and not their drawings."""
    from nbval.plugin import IPyNbCell

    compare_texts = IPyNbCell.compare_outputs

    def compare_outputs(self: Any, test: Any, ref: Any, skip_compare: Any = None) -> bool:
        if not compare_texts(self, test, ref, (*(skip_compare or self.parent.skip_compare), "image/svg+xml")):
            return False
        found, expected = ([out.get("metadata", {}).get("figure") for out in outs] for outs in (test, ref))
        self.comparison_traceback += differences(found, expected)
        return not self.comparison_traceback

    IPyNbCell.compare_outputs = compare_outputs


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace: dict[str, Any]) -> None:
    """Gives doctests the names that the book's setup cell gives a reader."""
    import keras
    import numpy

    doctest_namespace.update(np=numpy, keras=keras)
