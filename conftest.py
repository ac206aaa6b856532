"""What every test run shares: the kernels' environment, and the figures of a notebook compared when nbval runs it."""

from typing import Any

import pytest

from tools.kernel import prepare_environment

collect_ignore = ["tests/local_sgd_worker.py"]  # a script: it looks for its team as soon as it is imported


def pytest_configure(config: pytest.Config) -> None:
    """Prepares the environment, and lets nbval compare the data of figures, which it would skip as metadata."""
    prepare_environment()
    config.addinivalue_line("markers", "claim(sentence, chapter): the sentence of the book that this test holds")
    if config.getoption("nbval", default=False):
        from nbval.plugin import IPyNbCell

        compare_texts = IPyNbCell.compare_outputs

        def compare_outputs(self: Any, test: Any, ref: Any, skip_compare: Any = None) -> bool:
            if not compare_texts(self, test, ref, skip_compare):
                return False
            from companion import figures  # here: a notebook's setup cell may only now have installed it

            found, expected = ([out.get("metadata", {}).get("figure") for out in outs] for outs in (test, ref))
            self.comparison_traceback += figures.differences(found, expected)
            return not self.comparison_traceback

        IPyNbCell.compare_outputs = compare_outputs


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace: dict[str, Any]) -> None:
    """Gives doctests the names that the book's setup cell gives a reader."""
    import keras
    import numpy

    doctest_namespace.update(np=numpy, keras=keras)
