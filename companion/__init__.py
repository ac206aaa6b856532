"""The package behind the book *Keras Optimizers from the Inside*.

An optimizer sees the loss only through a gradient oracle; everything here changes one side of that conversation.
``dir(companion)`` shows what is public: the names to import from here, and the public modules.
"""

import sys as _sys
from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version
from typing import Any as _Any

# `python -m companion.launch` starts other processes and needs none of this, which would start TensorFlow here, too.
# While Python looks for a module that it is to run, `sys.argv[0]` is "-m".
if not (_sys.argv[:1] == ["-m"] and {"companion.launch", "-mcompanion.launch"} & set(_sys.orig_argv)):
    from companion import gradient_flow, legacy, merging, word_pairs
    from companion.accumulation import FlushAtEpochEnd, GradientAccumulation
    from companion.gradients import coalesce, moved
    from companion.implicit_euler import ImplicitEuler
    from companion.injection import InjectedModel, InjectedOptimizer, eject, inject
    from companion.lion import Lion
    from companion.local_sgd import LocalSGD
    from companion.minimize import minimize
    from companion.muon import Muon
    from companion.optimizers import SGD, Adam, AdamsBashforth2, Momentum, OptimisticSGD
    from companion.oracle import GradientOracle
    from companion.parameter_groups import ParameterGroups
    from companion.runge_kutta import RK23, RK45, Heun, RungeKutta, RungeKuttaChebyshev
    from companion.sam import SAM
    from companion.schedule_free import ScheduleFreeAdamW, SwapAverage
    from companion.sharpness import sharpness
    from companion.teams import connect
    from companion.word2vec import SkipGram
    from companion.wrapping import CoalesceGradients

try:
    __version__ = _version("keras-optimizer-companion")
except _NotInstalled:  # used from a source tree that is not installed
    __version__ = "0+unknown"

# In the order of the book's parts: anatomy, accumulation, integrators, many devices, newer rules; then public modules.
__all__ = [  # noqa: RUF022
    "SGD",
    "Momentum",
    "Adam",
    "ParameterGroups",
    "SkipGram",
    "CoalesceGradients",
    "coalesce",
    "GradientOracle",
    "inject",
    "eject",
    "GradientAccumulation",
    "FlushAtEpochEnd",
    "InjectedOptimizer",
    "InjectedModel",
    "moved",
    "RungeKutta",
    "Heun",
    "RK23",
    "RK45",
    "RungeKuttaChebyshev",
    "ImplicitEuler",
    "AdamsBashforth2",
    "OptimisticSGD",
    "connect",
    "LocalSGD",
    "Lion",
    "Muon",
    "ScheduleFreeAdamW",
    "SwapAverage",
    "minimize",
    "SAM",
    "sharpness",
    "gradient_flow",
    "legacy",
    "merging",
    "word_pairs",
]

_LAZY = ("datasets", "exercises", "figures", "launch")  # public modules that are loaded when they are asked for


def __getattr__(name: str) -> _Any:
    if name in _LAZY:
        return _import_module(f"companion.{name}")
    raise AttributeError(f"module 'companion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_LAZY, "__doc__", "__version__"]
