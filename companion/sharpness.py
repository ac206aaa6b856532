"""The largest curvature of a model's loss: what decides how long a step may be. Chapter 18 of the book teaches it."""

import math
import warnings
import weakref
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from companion import arguments
from companion.batches import examples, joined, tensors
from companion.denominators import compiled_loss
from companion.oracle import GradientOracle
from companion.questions import is_own

_BASIS = 24  # vectors that are kept at most
_KEPT = 3  # of them, when there are as many
_ASYMMETRY = 0.02  # of the largest eigenvalue; half precision stays below a tenth of it
_PATIENCE = 3  # estimates of the error in a row: one may be small while a larger eigenvalue is still hidden
# Of each model: references to what its functions were traced with, and these by the shapes of the data. None holds it.
_TRACED = weakref.WeakKeyDictionary[Any, tuple[list[Any], dict[Any, Any]]]()
_SHAPES = 8  # functions that are kept of a model at most


def sharpness(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    micro_batches: int = 1,
    tolerance: float = 1e-6,
    max_products: int = 500,
) -> float:
    r"""The largest eigenvalue of the Hessian of a model's loss, for the weights that are trained.

    .. math::

       \lambda = \max_{\lVert v \rVert = 1} v^\top \nabla^2 L(\theta)\, v

    Gradient descent at rate :math:`h` is stable as long as :math:`h \lambda < 2`. :math:`L` is the loss of all the data
    as ``evaluate`` computes it, with regularizers: layers act as in inference, so that dropout is off and BatchNorm
    uses what it has gathered. Nothing is moved, neither weights nor metrics nor statistics.

    The Lanczos method asks for products of the Hessian with vectors, which the :class:`~companion.GradientOracle`
    answers by differentiating its gradient once more: exact in the model's precision, where a difference of gradients
    would lose half of the digits, and wrong where a ReLU has its kink between the two. It keeps 24 vectors, as long
    as all the weights together.

    Products are compiled once for a model, its loss, its trainable weights and shapes of data: a second call begins at
    once. After a change of anything else in a layer, ``compile`` the model, as for ``evaluate``. A model with a
    ``compute_loss`` of its own, or without a compiled loss, is compiled at each call.

    Args:
        model: a compiled model.
        x: inputs, as ``fit`` takes them; or a finite ``tf.data.Dataset`` or ``keras.utils.PyDataset`` of batches.
        y: targets. Defaults to ``None``.
        sample_weight: weights of the examples. Defaults to ``None``.
        batch_size: how many examples are in memory at once, which does not change the result. Defaults to all.
        micro_batches: in how many parts a batch is, as in :func:`~companion.inject`. Defaults to 1.
        tolerance: the relative error of :math:`\lambda` at which to stop, estimated from the residual. Defaults to
            1e-6; in single precision there is little below.
        max_products: the largest number of products. Defaults to 500.

    Returns:
        The float :math:`\lambda`, which is negative only where the loss bends down in every direction.

    Raises:
        TypeError: ``model`` is not a ``keras.Model``.
        ValueError: an argument is wrong, nothing is trainable, the loss cannot be divided (see
            :class:`~companion.GradientOracle`), a product is not finite, or the Hessian is not symmetric, as where
            TensorFlow has no second derivative.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        >>> model.compile("sgd", "mse")
        >>> round(sharpness(model, np.array([[1.0], [3.0]]), np.array([[0.0], [0.0]])), 5)  # 2 (1² + 3²) / 2
        10.0

    References:
        Lanczos, 1950, "An iteration method for the solution of the eigenvalue problem of linear differential and
        integral operators". Pearlmutter, 1994, "Fast exact multiplication by the Hessian".

    Taught in chapter 18, :doc:`/notebooks/18_listening_in`.
    """
    arguments.number("tolerance", tolerance, 0, include_low=False)
    most = arguments.integer("max_products", max_products, 1)
    parts = arguments.integer("micro_batches", micro_batches, 1)
    if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
        x, y, sample_weight = _joined(x, y, sample_weight)
    x, y, sample_weight = tensors((x, y, sample_weight))
    if batch_size is not None:
        parts *= math.ceil(int(examples(x)) / arguments.integer("batch_size", batch_size, 1))
    ask = _products(model, (x, y, sample_weight), parts)
    size = sum(math.prod(variable.shape) for variable in model.trainable_weights)
    return _largest(ask, size, tolerance, most)


def _joined(batches: Any, y: Any, sample_weight: Any) -> Any:
    """All batches of a data set as one."""
    if y is not None or sample_weight is not None:
        raise ValueError("`y` and `sample_weight` must be left out where `x` is a data set: its batches hold them.")
    is_stream = isinstance(batches, tf.data.Dataset)
    count = int(batches.cardinality()) if is_stream else batches.num_batches
    if count in (0, None, tf.data.INFINITE_CARDINALITY):
        raise ValueError(f"`x` must be a finite data set with a batch in it. Received: x={batches!r}")
    each = batches if is_stream else (batches[index] for index in range(count))
    return joined([tensors(keras.utils.unpack_x_y_sample_weight(batch)) for batch in each])


def _products(model: Any, batch: Any, parts: int) -> Any:
    """A function of a vector that returns the Hessian's product with it: float64 outside, the model's within."""
    GradientOracle(model, batch, parts, training=False).prepare()  # which says what is wrong, and builds the model
    variables = model.trainable_weights
    if not variables:
        raise ValueError(f"`model` has no trainable weights. Received: model={model.name!r}")
    shapes = [tuple(variable.shape) for variable in variables]
    cuts = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    dtype = keras.backend.result_type("float32", *(variable.dtype for variable in variables))

    def product(vector: Any, batch: Any) -> Any:
        pieces = tf.split(vector, [math.prod(shape) for shape in shapes])
        direction = [tf.reshape(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]
        products = GradientOracle(model, batch, parts, training=False).curvature(direction)
        return tf.concat([tf.cast(tf.reshape(each, [-1]), dtype) for each in products], 0)

    compiled = product if model.run_eagerly else _traced(product, model, batch, dtype, parts)

    def ask(vector: Any) -> Any:
        found = np.asarray(compiled(tf.constant(vector, dtype), batch), "float64")
        if not np.isfinite(found).all():
            broken = [
                v.path for v, part in zip(variables, np.split(found, cuts), strict=True) if not np.isfinite(part).all()
            ]
            raise ValueError(
                "The Hessian is not finite at these weights, or on these data: look for infinite or NaN inputs, "
                f"weights and losses first. Received: NaN or infinity for {', '.join(broken)}"
            )
        return found

    return ask


def _traced(product: Any, model: Any, batch: Any, dtype: Any, parts: int) -> Any:
    """A compiled function of a vector and a batch: that of an earlier call if the model is what it was then.

    Each is traced by itself, past TensorFlow's warning that functions of one name are traced again and again.
    """
    loss = None if is_own(model, "compute_loss") else compiled_loss(model)
    known = [model.optimizer, *model.trainable_weights, *([] if loss is None else [loss])]
    then, functions = _TRACED.get(model, ([], {}))
    is_same = len(then) == len(known) and all(old() is new for old, new in zip(then, known, strict=True))
    if not is_same or loss is None:  # without one nothing tells whether the model has been compiled anew
        functions = {}
    specs = tree.map_structure(lambda leaf: None if leaf is None else tf.type_spec_from_value(leaf), batch)
    key = str((specs, parts))
    if key not in functions:
        if len(functions) == _SHAPES:
            functions.clear()
        vector = tf.TensorSpec([sum(math.prod(variable.shape) for variable in model.trainable_weights)], dtype)
        functions[key] = tf.function(product, autograph=False).get_concrete_function(vector, specs)
    _TRACED[model] = [weakref.ref(each) for each in known], functions
    return functions[key]


def _largest(ask: Any, size: int, tolerance: float, most: int) -> float:
    """The largest eigenvalue, by the Lanczos method with all vectors orthogonalised, restarted when there are many."""
    vector = np.random.default_rng(0).normal(size=size)
    basis, images, good = np.empty((0, size)), np.empty((0, size)), 0
    for _ in range(most):
        basis = np.vstack([basis, vector / np.linalg.norm(vector)])
        images = np.vstack([images, ask(basis[-1])])
        projected = basis @ images.T
        values, turns = np.linalg.eigh((projected + projected.T) / 2)
        if (apart := float(np.abs(projected - projected.T).max())) > _ASYMMETRY * np.abs(values).max():
            raise ValueError(
                "The Hessian is not symmetric, so second derivatives are missing: TensorFlow has none for bilinear "
                '`UpSampling2D` and `Resizing` (for `interpolation="nearest"` it has) and for fake quantization, and a '
                "custom gradient may have none. Received: products that should be equal, and are "
                f"{apart:.2g} apart, where the largest eigenvalue would be {values[-1]:.2g}"
            )
        value, top = float(values[-1]), turns[:, -1]
        residual = top @ images - value * (top @ basis)
        length, gap = float(np.linalg.norm(residual)), value - float(values[-2] if len(values) > 1 else -np.inf)
        error = length * min(1.0, length / gap) if gap > 0 and len(values) > 1 else length
        good = good + 1 if error <= tolerance * max(abs(value), float(abs(values[0]))) else 0
        if len(basis) == size or good == _PATIENCE or length == 0:
            return value
        if len(basis) == _BASIS:
            kept = turns[:, -_KEPT:].T
            basis, images = kept @ basis, kept @ images
        vector = residual
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
        if not np.linalg.norm(vector) > 0:
            return value
    warnings.warn(
        f"sharpness has found {value:.6g} to within {error:.2g}, and not within `tolerance`, after {most} products: "
        "raise `max_products` or `tolerance`.",
        stacklevel=3,
    )
    return value
