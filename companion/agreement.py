"""What workers compare, and a backup says it is of: optimizers by their classes, weights by their names."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from companion.wrapping import name_of, wrapped_by


def description(model: Any, outer_optimizer: Any) -> str:
    """Names, shapes and dtypes, one variable a line, behind a line with the classes of the optimizers.

    Args:
        model: a model that is compiled and built.
        outer_optimizer: an optimizer, or ``None``.
    """
    if not model.optimizer.built:  # a LossScaleOptimizer would begin anew
        model.optimizer.build(model.trainable_variables)
    trained = {id(variable) for variable in model.trainable_weights}
    lines = [f"{kind_of_optimizer(model.optimizer)} and outside {kind_of_optimizer(outer_optimizer)}"]
    for name, weight in zip(names_of(model.weights), model.weights, strict=True):
        how = "trained" if id(weight) in trained else "not trained"
        lines.append(f"{name} {tuple(weight.shape)} {weight.dtype} {how}")
    lines += [f"a slot {tuple(slot.shape)} {slot.dtype}" for slot in model.optimizer.variables]
    return "\n".join(lines)


def settings_of(optimizer: Any) -> str:
    """An optimizer's classes, and a line for each setting that is no function and no name.

    Args:
        optimizer: a ``keras.optimizers.Optimizer``, or ``None``.
    """
    if optimizer is None:
        return "None"
    lines = [f"{key}={value}" for key, value in optimizer.get_config().items() if key != "name" and not callable(value)]
    return "\n".join([kind_of_optimizer(optimizer), *(re.sub(r"'name': ('[^']*'|None)", "", line) for line in lines)])


def kind_of_optimizer(optimizer: Any) -> str:
    """The class of an optimizer, and of those that it wraps.

    Args:
        optimizer: a ``keras.optimizers.Optimizer``, or ``None``.
    """
    return " around ".join(type(each).__name__ for each in wrapped_by(optimizer)) or "None"


def names_of(variables: Sequence[Any]) -> list[str]:
    """The paths of variables. Of the numbers that Keras appends to names only the order is kept.

    Args:
        variables: Keras variables.
    """
    paths = [[part.rpartition("_") for part in name_of(variable).split("/")] for variable in variables]
    split = [
        [(stem, int(n)) if stem and n.isdigit() else (stem + bar + n, -1) for stem, bar, n in path] for path in paths
    ]
    numbers: dict[str, list[int]] = {}
    for stem, number in sorted(set(itertools.chain(*split))):
        numbers.setdefault(stem, []).append(number)
    return ["/".join(f"{stem}_{numbers[stem].index(n)}".removesuffix("_0") for stem, n in path) for path in split]
