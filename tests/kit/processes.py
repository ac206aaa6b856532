"""Programs in processes of their own, for what must be settled before TensorFlow starts."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from tests.kit import ROOT, shared
from tools.warm import FOR_TESTS, interpreter

_SEVERAL_DEVICES = """
import gc, json, os, sys
import tensorflow as tf

from tensorflow.python.data.ops import iterator_ops, multi_device_iterator_ops
# Whoever frees the iterator of a distributed data set waits up to a minute for its thread to wake up: at the end of
# `fit`, where nothing else holds it, or whenever garbage is collected. So none is freed.
gc.disable()
kept = []
for kind in (iterator_ops.OwnedIterator, multi_device_iterator_ops.OwnedMultiDeviceIterator):
    def keep(self, *arguments, make=kind.__init__, **named):
        kept.append(self)
        make(self, *arguments, **named)
    kind.__init__ = keep
(processor,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * {devices})
{program}
sys.stdout.flush()
os._exit(0)
"""


def warm() -> str:
    """A Python that has imported Keras already, and TensorFlow has started no device; one for all tests of a run."""
    return interpreter(shared.folder(), sys.executable, *FOR_TESTS)


@contextlib.contextmanager
def warm_workers() -> Iterator[None]:
    """What `companion.launch` starts here are such Pythons."""
    with mock.patch.object(sys, "executable", warm()):
        yield


def output_of(program: str, *arguments: str, python: str = sys.executable, **environment: str) -> str:
    """What a Python program prints, in the root of the project, where it may import what a test may."""
    places = [str(ROOT), str(ROOT / "book" / "_ext"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [python, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@shared.once_a_run
def on_devices(devices: int, program: str) -> Any:
    """What a program prints last, as JSON, where the processor is several devices; `json` and `tf` are imported."""
    return json.loads(
        output_of(_SEVERAL_DEVICES.format(devices=devices, program=program), python=warm()).splitlines()[-1]
    )
