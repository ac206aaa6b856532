"""A rule or a rate for each group of variables, in one optimizer. Chapter 16 of the book teaches it.

A rate is a factor on that of the default optimizer, which keeps slots and the counter for all such groups. A rule is
another optimizer, to which the gradients of its group are handed on.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from companion import arguments
from companion.agreement import names_of
from companion.gradients import coalesce, scaled, square, widened
from companion.wrapping import CoalesceGradients, WrappingOptimizer, name_of, wrapped_by

_PATHS = 40  # how many an error lists

# Private names of Keras, both on one instance and for the time of a step; checked on 3.13.2 and 3.15.1.
# tests/test_parameter_groups.py notices when they move.
_RATE, _DECAY = "_get_current_learning_rate", "_apply_weight_decay"


@keras.saving.register_keras_serializable(package="companion")
class ParameterGroups(WrappingOptimizer):
    r"""An optimizer with a rate, or a rule, of its own for each group of variables.

    Where a group has a factor :math:`f`, the default optimizer moves it, with all that it is, by :math:`f` times its
    learning rate, as in a parameter group of PyTorch:

    .. math::

       h_{\text{group}} = f \, h

    The factor holds wherever the rate stands: in the step, in weight decay, and for a rate that a schedule or a
    callback changes. Where a group has an optimizer, that one moves it, with its own rate, settings and counter.

    Args:
        default: a ``keras.optimizers.Optimizer``, for variables in no group and in groups with a factor.
        groups: a dictionary. A key is a regular expression that is searched (``re.search``) in the paths of variables,
            such as ``"net/head/kernel"``: ``"head"`` is found in ``multi_head_attention``, too, and ``"(^|/)head/"``
            is not. A value is a number :math:`f \ge 0`, or a ``keras.optimizers.Optimizer``. With :math:`f = 0` a group
            is left as it is, its slots too, as if it were frozen.
        global_clipnorm: a norm :math:`> 0`. If the gradients of all groups together have a larger one, they are scaled
            down to it, before any rule sees them. Repeated rows of a sparse gradient are summed first. (That of an
            optimizer inside is for its own variables.) Defaults to ``None``.
        name: a name for the optimizer. Defaults to one made from the class.

    Attributes:
        default: the optimizer given.
        groups: a copy of what was given.

    Raises:
        ValueError: an argument is wrong, one optimizer is given twice, or one that belongs outside (an accumulation, a
            ``LossScaleOptimizer``) or asks itself (an :class:`~companion.InjectedOptimizer`). When it is built, before
            anything moves: a pattern matches nothing, or two match the same variable; the error lists paths.

    Example:
        >>> head, body = keras.Variable([0.0], name="head"), keras.Variable([0.0], name="body")
        >>> optimizer = ParameterGroups(keras.optimizers.SGD(1.0), {"body": 0.25})
        >>> optimizer.apply([np.array([-1.0]), np.array([-1.0])], [head, body])
        >>> optimizer.learning_rate = 2.0
        >>> optimizer.apply([np.array([-1.0]), np.array([-1.0])], [head, body])
        >>> head.numpy().tolist(), body.numpy().tolist()
        ([3.0], [0.75])

    What is asked of it, or set on it, is the default's: ``learning_rate`` and its schedules, ``iterations`` (each call
    of ``apply`` counts once), ``momentum``. But ``weight_decay``, ``clipnorm``, ``clipvalue``, ``use_ema`` and its
    kin, and ``loss_scale_factor`` are set on every optimizer in it, and ``exclude_from_weight_decay`` holds for all.
    (Keras loses what was excluded when an optimizer is saved; a group with an optimizer that does not decay is kept.)

    Once built, it knows its groups by the places of variables, and saves them: loading gives variables other paths
    (``net/head/kernel`` becomes ``head/kernel``), and the groups stay as they were. In a new model of other shapes, the
    patterns are searched anew. Where one is not found, all are searched in the paths that a process of its own would
    give: Keras numbers layers without a name, and the first ``dense_7`` is ``dense`` there.

    Unlike ``keras.optimizers.MultiOptimizer``, it can be saved and loaded with its state, has a learning rate, clips
    over all groups, and searches patterns instead of matching the whole path.

    References:
        Howard and Ruder, 2018, "Universal language model fine-tuning for text classification", for rates by layer.

    Taught in chapter 16, :doc:`/notebooks/16_one_answer_newer_rules`.
    """

    default: Any
    _holder = "default"

    def __init__(
        self, default: Any, groups: Mapping[str, Any], global_clipnorm: float | None = None, name: str | None = None
    ) -> None:
        if not isinstance(groups, Mapping):
            raise ValueError(
                "`groups` must be a dictionary from regular expressions to numbers or optimizers. "
                f"Received: groups={groups!r}"
            )
        groups = {pattern: _checked(pattern, value) for pattern, value in groups.items()}
        rules = [default, *(value for value in groups.values() if not isinstance(value, float))]
        _check_together(rules)
        super().__init__(default, name=name)
        pairs = [(default, value) if isinstance(value, float) else (value, 1.0) for value in groups.values()]
        own = self.__dict__  # where Keras and TensorFlow track nothing
        own.update(_groups=groups, _pairs=((default, 1.0), *pairs), _places={}, _stepping=0)
        own.update(_saved_places=None, _saved_whole=[])
        self._rules = rules  # a list, for Keras and tf.train.Checkpoint to find
        self.global_clipnorm = global_clipnorm

    @property
    def groups(self) -> dict[str, Any]:
        """Patterns, and a factor or an optimizer for each."""
        return dict(self._groups)

    def wrapped(self) -> list[Any]:
        """The default optimizer, then those of the groups."""
        return list(self._rules)

    def __getattr__(self, name: str) -> Any:
        """Asks the default optimizer for what is not here, but not for what others take for a single optimizer's."""
        if name in ("inner_optimizer", "optimizers"):  # callbacks of Keras would set and swap these one by one
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in ("eval", "train"):  # of a ScheduleFreeAdamW: there may be several side by side
            parts = [getattr(rule, name) for rule in vars(self).get("_rules", ()) if hasattr(rule, name)]
            if parts:
                return lambda: max([part() for part in parts])
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets on the default optimizer what is its own, and refuses what a compiled training step would not notice."""
        if name in ("default", "groups") and self._inner is not None:
            raise ValueError(
                f"`{name}` cannot be set, since compiled steps hold it: compile the model with a new "
                f"ParameterGroups(optimizer.default, groups). Received: {name}={value!r}"
            )
        super().__setattr__(name, value)

    def _set_there(self, name: str, value: Any) -> None:
        if name == "global_clipnorm":
            self.__dict__[name] = value if value is None else arguments.number(name, value, 0, include_low=False)
        elif name == "gradient_accumulation_steps" and value:
            raise ValueError(f"{_ACCUMULATE} Received: {name}={value!r}")
        else:
            super()._set_there(name, value)

    # Which variable is whose

    def build(self, variables: list[Any]) -> None:
        """Finds the group of each variable, and builds the optimizers with theirs."""
        if self.built:
            return
        places = self._found_again(variables) or self._searched(variables)
        self.__dict__["_places"] = dict(zip(map(self._var_key, variables), places, strict=True))
        for rule, knew_all in zip(self._rules, self._saved_whole, strict=False):
            if knew_all and not rule.built:
                rule.build(variables)
        super().build(variables)

    def _found_again(self, variables: list[Any]) -> list[int] | None:
        """The groups of variables as they were when this optimizer was saved, if these are they, or the trained ones.

        A model that is loaded hands over those that were not frozen when it was saved.
        """
        saved = self._saved_places or []
        for known in (saved, [(place, shape, trained) for place, shape, trained in saved if trained]):
            if known and [shape for _, shape, _ in known] == [list(variable.shape) for variable in variables]:
                return [place for place, _, _ in known]
        return None

    def _searched(self, variables: list[Any]) -> list[int]:
        """The groups of variables by their paths: 0 is none, 1 the first."""
        paths = [name_of(variable) for variable in variables]
        found, missed = self._matches(paths)
        twice = {path: patterns for path, patterns in zip(paths, found, strict=True) if len(patterns) > 1}
        if twice:
            raise ValueError(
                "`groups` must not match a variable twice: make the patterns narrower. A pattern is searched anywhere "
                f"in a path; ^ and $ are its ends. Received: {dict(list(twice.items())[:_PATHS])}"
            )
        if missed and variables:
            found, still_missed = self._matches(names_of(variables))
            if still_missed or max(map(len, found)) > 1:
                half = _PATHS // 2
                shown = paths if len(paths) <= _PATHS else [*paths[:half], "...", *paths[-half:]]
                raise ValueError(
                    f"`groups` must match variables, and nothing matches {missed}. Paths are made of the names of "
                    "layers: give them names, since Keras numbers the others anew in each model (dense_3); a loaded "
                    "model has no names of models in them (net/head is head). A frozen layer is not among the "
                    "variables: build first, model.optimizer.build(model.trainable_variables), then freeze it. "
                    f"Received: paths={shown}"
                )
        numbers = {pattern: number for number, pattern in enumerate(self._groups, 1)}
        return [numbers[patterns[0]] if patterns else 0 for patterns in found]

    def _matches(self, names: list[str]) -> tuple[list[list[str]], list[str]]:
        """The patterns that match each name, and those that match none."""
        found = [[pattern for pattern in self._groups if re.search(pattern, name)] for name in names]
        return found, [pattern for pattern in self._groups if not any(pattern in patterns for patterns in found)]

    def _shares(self, variables: list[Any]) -> list[tuple[Any, list[Any]]]:
        owners = [self._rule_and_factor(variable)[0] for variable in variables]
        pairs = list(zip(owners, variables, strict=True))
        return [(rule, [variable for owner, variable in pairs if owner is rule]) for rule in self._rules]

    def _rule_and_factor(self, variable: Any) -> tuple[Any, float]:
        return self._pairs[self._places[self._var_key(variable)]]

    @property
    def _model_variables_moving_average(self) -> list[Any]:
        shares = [(rule, variables) for rule, variables in self._shares(self._trainable_variables) if variables]
        if len({bool(rule.use_ema) for rule, _ in shares}) == 2:
            raise ValueError(
                "`use_ema` must be the same in all groups, or there are weights without an average: set it on all "
                f"before training, optimizer.use_ema = True. Received: {[rule.use_ema for rule, _ in shares]}"
            )
        return super()._model_variables_moving_average

    def _stays(self, variable: Any) -> bool:
        return super()._stays(variable) or (self._knows(variable) and not self._rule_and_factor(variable)[1])

    # A step

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Lets each optimizer make its step with the gradients of its variables.

        Args:
            grads: a gradient for each variable; ``None`` where there is none.
            trainable_variables: the variables. Defaults to those that the optimizer was built with.

        Raises:
            ValueError: the optimizer is not built and there are no variables; variables and gradients do not match; a
                variable is unknown. Nothing was moved.
        """
        grads = list(grads)
        if not grads:
            return
        variables, given, fitting = self._matched(grads, trainable_variables)
        with fitting, self._all_or_nothing(variables), self._frozen_stay():
            given = self._clipped([pair for pair in given if self._rule_and_factor(pair[1])[1]])
            if self.loss_scale_factor:  # which Keras cannot divide a sparse gradient by
                given = [(tf.convert_to_tensor(gradient), variable) for gradient, variable in given]
            for rule in self._rules:
                share = [pair for pair in given if self._rule_and_factor(pair[1])[0] is rule]
                if share:
                    with self._rates() if rule is self.default else nullcontext():
                        rule.apply([gradient for gradient, _ in share], [variable for _, variable in share])
                elif rule is self.default:
                    rule.iterations.assign_add(1)  # it counts the updates of all, and schedules follow it

    @contextmanager
    def _all_or_nothing(self, variables: list[Any]) -> Iterator[None]:
        """A context in which the first rules have not moved if the last one fails. In a graph nothing has run then."""
        several = len(self._rules) > 1 and tf.executing_eagerly()
        before = [(v, tf.identity(v)) for v in (*variables, *self.variables)] if several else []
        try:
            yield
        except Exception:
            for variable, value in before:
                variable.assign(value)
            raise

    def _clipped(self, pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        """Gradients and variables, the gradients scaled down by one number if they are too large together."""
        if self.global_clipnorm is None or all(_is_overwritten(variable) for _, variable in pairs):
            return pairs
        bound = self.global_clipnorm * (self.loss_scale_factor or 1.0)
        measured = [widened(coalesce(g)) for g, variable in pairs if not _is_overwritten(variable)]
        widest = keras.backend.result_type(*(gradient.dtype.name for gradient in measured))
        norm = tf.sqrt(tf.add_n([square(gradient, widest, in_xla=False) for gradient in measured]))
        # As in Keras, all gradients are NaN if one is not finite.
        factor = bound * tf.minimum(1.0 / norm, 1.0 / bound) + (norm - norm)
        return [(g if _is_overwritten(variable) else scaled(g, factor), variable) for g, variable in pairs]

    @contextmanager
    def _rates(self) -> Iterator[None]:
        """A context in which the default rule has another rate for each variable. Replicas enter it one by one."""
        rule = list(wrapped_by(self.default))[-1]
        own, state = vars(rule), self.__dict__
        if all(factor == 1.0 for _, factor in self._pairs):
            yield
            return
        if not self._stepping:
            state["_before"] = {name: own[name] for name in ("update_step", _DECAY) if name in own}
            own.update(self._hooks(rule))
        state["_stepping"] += 1
        try:
            yield
        finally:
            state["_stepping"] -= 1
            if not self._stepping:
                for name in ("update_step", _DECAY):
                    own.pop(name)
                own.update(self._before)

    def _hooks(self, rule: Any) -> dict[str, Any]:
        """The rule's step and its decay, at the rate of each variable."""
        step, decay, rate = rule.update_step, getattr(rule, _DECAY), getattr(rule, _RATE)

        def at(factor: float, function: Any, *arguments: Any) -> None:
            vars(rule)[_RATE] = lambda: _times(factor, rate())
            try:
                function(*arguments)
            finally:
                vars(rule).pop(_RATE, None)

        def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
            factor = self._rule_and_factor(variable)[1]
            at(factor, step, gradient, variable, _times(factor, learning_rate))

        def apply_weight_decay(variables: list[Any]) -> None:
            factors = [self._rule_and_factor(variable)[1] for variable in variables]
            for factor in dict.fromkeys(factors):
                at(factor, decay, [v for v, theirs in zip(variables, factors, strict=True) if theirs == factor])

        return {"update_step": update_step, _DECAY: apply_weight_decay}

    # Saving

    @property
    def _assignment(self) -> list[int]:
        return [self._places[self._var_key(variable)] for variable in self._trainable_variables]

    def save_own_variables(self, store: Any) -> None:
        """Saves which group each variable is in; Keras saves the optimizers by itself."""
        store["groups"] = np.array(self._assignment, "int32")

    def load_own_variables(self, store: Any) -> None:
        """Checks that the file has the same groups; Keras loads the optimizers by itself."""
        theirs = np.array(store["groups"]).tolist() if "groups" in store.keys() else []  # noqa: SIM118
        if self.built and len(theirs) == len(self._assignment) and theirs != self._assignment:
            paths = [name_of(variable) for variable in self._trainable_variables]
            other = [path for path, a, b in zip(paths, theirs, self._assignment, strict=True) if a != b]
            raise ValueError(
                "The file is of an optimizer with other groups, whose memory would get to other weights: load it into "
                f"one with the same `groups`. Received: other groups for {other[:_PATHS]}"
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving, and the groups of the variables by their places."""
        serialize = keras.saving.serialize_keras_object
        places, whole = self._saved_places, self._saved_whole
        if self.built:
            whole = [len(rule._trainable_variables) == len(self._places) for rule in self._rules]
            known = zip(self._assignment, self._trainable_variables, strict=True)
            places = [[place, list(variable.shape), bool(variable.trainable)] for place, variable in known]
        groups = [[pattern, serialize(value)] for pattern, value in self._groups.items()]
        own = {"groups": groups, "global_clipnorm": self.global_clipnorm, "places": places, "whole": whole}
        return {"name": self.name, "default": serialize(self.default), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Creates an optimizer from what ``get_config`` has returned."""
        made, make = dict(config), keras.saving.deserialize_keras_object
        made["default"] = make(config["default"], custom_objects)
        made["groups"] = {pattern: make(value, custom_objects) for pattern, value in config["groups"]}
        places, whole = made.pop("places", None), made.pop("whole", [])
        optimizer = cls(**made)
        optimizer.__dict__.update(_saved_places=places, _saved_whole=whole)
        return optimizer


def _times(factor: float, rate: Any) -> Any:
    return rate if factor == 1.0 else keras.ops.multiply(rate, factor)


def _is_overwritten(variable: Any) -> bool:
    """Whether what comes as a gradient is the variable's new value, as for the scales of a float8 layer."""
    return getattr(variable, "overwrite_with_gradient", False)


# What an argument may be

_ACCUMULATE = (
    "`gradient_accumulation_steps` must be left out of groups: accumulate around them, "
    "companion.GradientAccumulation(ParameterGroups(...), steps)."
)


def _checked(pattern: Any, value: Any) -> Any:
    """Returns a factor as a float, and an optimizer as it is, or raises."""
    received = f"Received: groups={{{pattern!r}: {value!r}}}"
    try:
        is_pattern = isinstance(pattern, str) and bool(re.compile(pattern))
    except re.error:
        is_pattern = False
    if not is_pattern:
        raise ValueError(f"A key of `groups` must be a regular expression, in a string. {received}")
    if isinstance(value, keras.optimizers.Optimizer):
        return value
    try:
        return arguments.number("groups", value, 0)
    except ValueError:
        raise ValueError(
            "A value of `groups` must be a number of at least 0, which is a factor on the default's learning rate, or "
            "a keras.optimizers.Optimizer, such as keras.optimizers.SGD(0.1); for a name use "
            f"keras.optimizers.get(name). {received}"
        ) from None


def _check_together(rules: list[Any]) -> None:
    """Raises if one of the optimizers cannot be in groups, or not with the others. The first is the default."""
    seen: set[int] = set()
    for number, rule in enumerate(rules):
        argument = "groups" if number else "default"
        received = f"Received: {argument}={rule!r}"
        if not isinstance(rule, keras.optimizers.Optimizer):
            raise ValueError(
                "`default` must be an instance of keras.optimizers.Optimizer, such as keras.optimizers.Adam(); for a "
                f"name use keras.optimizers.get(name). {received} of {type(rule)}"
            )
        for layer in wrapped_by(rule):
            name = type(layer).__name__
            outside = isinstance(layer, WrappingOptimizer) and not isinstance(layer, CoalesceGradients)
            if isinstance(layer, (ParameterGroups, getattr(keras.optimizers, "MultiOptimizer", ParameterGroups))):
                words = "hold groups of their own: put their rules into `groups`."
            elif isinstance(layer, keras.optimizers.LossScaleOptimizer) or outside:
                words = f"hold a {name}, which belongs outside: {name}(ParameterGroups(...), ...)."
                words += "" if outside else " The mixed_float16 policy and `compile` put it there."
            elif callable(getattr(layer, "direction", None)):
                words = f"hold a {name}, which asks for gradients of all weights together: use it alone."
            elif layer.gradient_accumulation_steps:
                raise ValueError(f"{_ACCUMULATE} {received}")
            elif id(layer) in seen:
                words = "hold one optimizer twice: make one for each group, or let one pattern match both, 'a|b'."
            else:
                seen.add(id(layer))
                continue
            raise ValueError(f"`{argument}` must not {words} {received}")
    factors = [rule.loss_scale_factor for rule in rules]
    if len(set(factors)) > 1:
        raise ValueError(
            "`loss_scale_factor` must be the same in all optimizers, since there is one loss: leave it out and set it "
            f"on ParameterGroups(...). Received: loss_scale_factor={factors}"
        )
