"""The package behind the book *Keras Optimizers from the Inside*. Every public name is importable from here."""

from importlib.metadata import PackageNotFoundError, version

from companion.accumulation import FlushAtEpochEnd, GradientAccumulation
from companion.implicit_euler import ImplicitEuler
from companion.injection import InjectedModel, InjectedOptimizer, eject, inject
from companion.local_sgd import LocalSGD, connect
from companion.multistep import AdamsBashforth2, OptimisticSGD
from companion.optimizers import SGD, Adam, Momentum
from companion.oracle import GradientOracle
from companion.runge_kutta import RK23, RK45, Heun, RungeKutta, RungeKuttaChebyshev
from companion.sparse import CoalesceGradients
from companion.word2vec import SkipGram

try:
    __version__ = version("keras-optimizer-companion")
except PackageNotFoundError:  # used from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "RK23",
    "RK45",
    "SGD",
    "Adam",
    "AdamsBashforth2",
    "CoalesceGradients",
    "FlushAtEpochEnd",
    "GradientAccumulation",
    "GradientOracle",
    "Heun",
    "ImplicitEuler",
    "InjectedModel",
    "InjectedOptimizer",
    "LocalSGD",
    "Momentum",
    "OptimisticSGD",
    "RungeKutta",
    "RungeKuttaChebyshev",
    "SkipGram",
    "connect",
    "eject",
    "inject",
]
