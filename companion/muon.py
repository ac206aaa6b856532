r"""Muon: a step whose singular values are all about one. Chapter 16 of the book teaches it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from companion import arguments
from companion.optimizers import Adam
from companion.wrapping import name_of

A, B, C = 3.4445, -4.7750, 2.0315  # steep at 0, and between 0.7 and 1.2 wherever it has arrived
_SCALES = {
    "moonlight": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1, columns / rows)),
}
_HEADS = {r"(query|key|value)/kernel$": 1}
_EACH_ENTRY = r"(^|[/_])(bias|beta|gamma|alpha)(:0)?$"  # what acts on each entry alone, whatever its shape


def orthogonalized(matrix: Any, steps: int) -> Any:
    """Brings the singular values of a matrix near 1 and keeps its singular vectors: Newton–Schulz, see :class:`Muon`.

    Args:
        matrix: a tensor of rank 2.
        steps: how many.
    """
    x = ops.convert_to_tensor(matrix)
    is_tall = x.shape[0] > x.shape[1]
    x = ops.transpose(x) if is_tall else x  # the smaller square
    x = ops.divide(x, ops.add(ops.sqrt(ops.sum(ops.square(x))), 1e-7))
    for _ in range(steps):
        s = ops.matmul(x, ops.transpose(x))
        x = ops.add(ops.multiply(x, A), ops.matmul(ops.add(ops.multiply(s, B), ops.multiply(ops.matmul(s, s), C)), x))
    return ops.transpose(x) if is_tall else x


@keras.saving.register_keras_serializable(package="companion")
class Muon(Adam):
    r"""Muon for the matrices inside a network, Adam for the rest: momentum, orthogonalised.

    .. math::

       M &\leftarrow \mu M + G \\
       \theta &\leftarrow \theta - h\, s \operatorname{NS}(G + \mu M)

    :math:`\operatorname{NS}` brings the singular values near 1 and keeps the singular vectors, by the iteration of
    Newton–Schulz with :math:`a, b, c` = 3.4445, -4.7750, 2.0315:

    .. math::

       X_0 = X / (\lVert X \rVert_F + 10^{-7}), \qquad X_{k+1} = a X_k + (b S_k + c S_k^2) X_k, \qquad
       S_k = X_k X_k^\top

    Those above a hundredth of the norm end between 0.68 and 1.14 after five steps: not at 1, and need not. With
    ``nesterov=False`` it is taken of :math:`M`; always of what the step would be, never of the raw gradient. The
    decay :math:`\lambda` is that of the base class, :math:`\theta \leftarrow (1 - h \lambda) \theta` before the step,
    which is Moonlight's.

    Muon takes the variables of rank 2 and above. One of rank above 2 is a matrix whose rows are what it sums over: all
    axes but the last, which is right for the kernel of a convolution, :math:`(\text{height} \cdot \text{width} \cdot
    \text{channels}) \times \text{filters}`. Vectors take the step of :class:`~companion.Adam`, with the same learning
    rate; so do biases of any shape (those of attention have an axis of heads, those of ``GRU`` two rows), and what
    scales or shifts each entry: variables called ``bias``, ``beta``, ``gamma`` or ``alpha``.

    **Name in** ``exclude`` **the embeddings and the output layer**: they should take Adam's step, too, and cannot be
    told from other matrices. (Keras's Muon looks for the word "embedding" in the path; a layer named ``tokens`` has
    none.)

    Slots: ``momentum`` :math:`M`, of the variable's shape and dtype, zero at the start; where Adam steps, also its
    ``velocity``.

    Args:
        learning_rate: :math:`h`, see :class:`~companion.SGD`; a good one for Adam is a good one here with
            ``scale="moonlight"``. Defaults to 0.001.
        momentum: :math:`\mu`, a number in [0, 1). Defaults to 0.95.
        nesterov: whether the step looks ahead. Defaults to ``True``.
        steps: of Newton–Schulz, at least 1. Defaults to 5.
        scale: :math:`s`, for a matrix of :math:`r` rows and :math:`k` columns. ``"moonlight"``:
            :math:`0.2 \sqrt{\max(r, k)}`, so that the entries of a step are about as large as Adam's. ``"original"``:
            :math:`\sqrt{\max(1, k / r)}`, with learning rates of about 0.02. Defaults to ``"moonlight"``.
        exclude: regular expressions; what they are found in, the paths of variables, take Adam's step. (``"head"`` is
            found in ``multi_head_attention``, too, and ``"(^|/)head/"`` is not.) Defaults to none.
        input_axes: for each regular expression, how many leading axes of the variables that it is found in are the rows
            of the matrix. Defaults to 1 for the ``query``, ``key`` and ``value`` of Keras's attention layers, whose
            kernels have three axes, heads the second. (Give ``{}`` if a ``Conv1D`` has such a name.)
        beta_1: Adam's. Defaults to 0.9.
        beta_2: Adam's. Defaults to 0.95.
        epsilon: Adam's. Defaults to 1e-7.
        weight_decay: :math:`\lambda`, a number :math:`\ge 0`, of all variables. Defaults to ``None``.
        **kwargs: those of ``keras.optimizers.Optimizer``, see :class:`~companion.SGD`.

    Raises:
        ValueError: an argument is wrong; at the first step, an expression in ``exclude`` is found in no path.

    Example:
        >>> weight = keras.Variable([[0.0, 0.0], [0.0, 0.0]])
        >>> Muon(learning_rate=1.0, scale="original").apply([np.diag([4.0, -1.0])], [weight])
        >>> (100 * weight.numpy()).round().tolist()
        [[-74.0, 0.0], [0.0, 74.0]]

    It orthogonalises in at least float32. For another rule than Adam, or another rate for it, see
    :class:`~companion.ParameterGroups`.

    References:
        Jordan, Jin, Boza, You, Cesista, Newhouse and Bernstein, 2024, "Muon: An optimizer for hidden layers in neural
        networks". Liu and others, 2025, "Muon is scalable for LLM training" (Moonlight).

    Taught in chapter 16, :doc:`/notebooks/16_one_answer_newer_rules`.
    """

    _matrices: tuple[int, ...] = ()  # for each variable how many rows it has; 0 where Adam steps
    _saved: tuple[Any, ...] = ()  # the same of a file, with shapes, and whether they were trained

    def __init__(
        self,
        learning_rate: Any = 0.001,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        scale: str = "moonlight",
        exclude: Sequence[str] = (),
        input_axes: Mapping[str, int] | None = None,
        beta_1: float = 0.9,
        beta_2: float = 0.95,
        epsilon: float = 1e-7,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        decay = arguments.weight_decay(weight_decay)
        super().__init__(learning_rate, beta_1, beta_2, epsilon, weight_decay=decay, **kwargs)
        self.momentum = arguments.number("momentum", momentum, 0, 1)
        if not isinstance(nesterov, bool):
            raise ValueError(f"`nesterov` must be True or False. Received: nesterov={nesterov!r}")
        self.nesterov, self.steps = nesterov, arguments.integer("steps", steps, 1)
        self.scale = arguments.choice("scale", scale, tuple(_SCALES))
        axes = _HEADS if input_axes is None else input_axes
        if isinstance(exclude, str) or not all(_is_pattern(pattern) for pattern in exclude):
            raise ValueError(f"`exclude` must be a list of regular expressions. Received: exclude={exclude!r}")
        if not (isinstance(axes, Mapping) and all(_is_pattern(pattern) for pattern in axes)):
            raise ValueError(
                f"`input_axes` must map regular expressions to numbers of axes. Received: input_axes={axes!r}"
            )
        self.exclude = tuple(exclude)
        self.input_axes = tuple((pattern, arguments.integer("input_axes", axes[pattern], 1)) for pattern in axes)

    def build(self, variables: list[Any]) -> None:
        """Creates a momentum for each variable, and a velocity for those that take Adam's step."""
        if self.built:
            return
        self._matrices = self._found_again(variables) or self._searched(variables)
        keras.optimizers.Optimizer.build(self, variables)
        self.momentums = self.add_optimizer_variables(variables, "momentum")
        self.velocities = [
            None if rows else self.add_variable_from_reference(variable, "velocity")
            for rows, variable in zip(self._matrices, variables, strict=True)
        ]

    def _found_again(self, variables: list[Any]) -> tuple[int, ...]:
        """What a file says of these variables, or of those that were not frozen: loading gives other paths."""
        for known in (self._saved, [entry for entry in self._saved if entry[2]]):
            if [list(shape) for shape, *_ in known] == [list(variable.shape) for variable in variables]:
                return tuple(rows for _, rows, _ in known)
        return ()

    def _searched(self, variables: list[Any]) -> tuple[int, ...]:
        paths = [name_of(variable) for variable in variables]
        missed = [pattern for pattern in self.exclude if not any(re.search(pattern, path) for path in paths)]
        if missed:
            raise ValueError(
                f"`exclude` must be found in the paths of variables, which are {paths}. Received: exclude={missed}, "
                "found in none"
            )
        return tuple(self._rows_of(variable) for variable in variables)

    def _rows_of(self, variable: Any) -> int:
        rank, path = len(variable.shape), name_of(variable)
        if rank < 2 or any(re.search(pattern, path) for pattern in self.exclude):
            return 0
        axes = next((axes for pattern, axes in self.input_axes if re.search(pattern, path)), 0)
        if rank > 3 and self.input_axes == tuple(_HEADS.items()):  # a convolution may be called `query`
            axes = 0
        if not axes and re.search(_EACH_ENTRY, path):
            return 0
        return math.prod(variable.shape[: min(axes or rank - 1, rank - 1)])

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Moves ``variable`` by one step of the rule."""
        index = self._get_variable_index(variable)
        rows = self._matrices[index]
        if not rows:
            super().update_step(gradient, variable, learning_rate)
            return
        gradient, m = ops.cast(gradient, variable.dtype), self.momentums[index]
        self.assign(m, ops.add(ops.multiply(m, self.momentum), gradient))
        ahead = ops.add(ops.multiply(m, self.momentum), gradient) if self.nesterov else m

        wide = keras.backend.result_type(variable.dtype, "float32")
        matrix = ops.reshape(ops.cast(ahead, wide), (rows, -1))
        step = ops.multiply(orthogonalized(matrix, self.steps), _SCALES[self.scale](*matrix.shape))
        step = ops.multiply(step, ops.cast(learning_rate, wide))
        self.assign_sub(variable, ops.reshape(step, variable.shape))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saving, and which variables are matrices, by their places."""
        own = {name: getattr(self, name) for name in ("momentum", "nesterov", "steps", "scale")}
        own |= {"exclude": list(self.exclude), "input_axes": dict(self.input_axes)}
        known = self._saved
        if self.built:
            pairs = zip(self._trainable_variables, self._matrices, strict=True)
            known = tuple((tuple(v.shape), rows, bool(v.trainable)) for v, rows in pairs)
        if known:
            own |= {"matrices": [[list(shape), rows] for shape, rows, _ in known], "trained": [t for *_, t in known]}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Creates an optimizer from what ``get_config`` has returned."""
        own = dict(config)
        matrices = own.pop("matrices", ())
        trained = own.pop("trained", [True] * len(matrices))
        optimizer = super().from_config(own, custom_objects)
        pairs = zip(matrices, trained, strict=True)
        optimizer._saved = tuple((tuple(shape), rows, is_trained) for (shape, rows), is_trained in pairs)
        return optimizer


def _is_pattern(pattern: Any) -> bool:
    try:
        return isinstance(pattern, str) and bool(re.compile(pattern))
    except re.error:
        return False
