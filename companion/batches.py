"""What a batch is: the tensors of (x, y, sample_weight), and how their rows are divided. Chapter 06 teaches it.

What is not known to be divisible is not divided: every tensor has to have a row for each example.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import tree


def unpacked(data: Any) -> tuple[Any, Any, Any]:
    """The batch as (x, y, sample_weight); nothing in it is converted.

    Args:
        data: ``x``, ``(x, y)`` or ``(x, y, sample_weight)``.

    Raises:
        ValueError: there is no tensor in ``x``.
    """
    batch = keras.utils.unpack_x_y_sample_weight(data)
    if all(tensor is None for tensor in tree.flatten(batch[0])):
        raise ValueError(
            "`data` must be one batch: x, (x, y) or (x, y, sample_weight), and x must hold a tensor. Received: "
            f"data={data!r}"
        )
    return batch


def examples(x: Any) -> Any:
    """How many there are, by the first tensor, as Keras counts them: an integer where that is static.

    Args:
        x: the inputs.
    """
    first = next(tensor for tensor in tree.flatten(x) if tensor is not None)
    return _rows(first if hasattr(first, "shape") else tf.convert_to_tensor(first))


def copied(batch: Any) -> Any:
    """The same in tensors of their own: a layer that returns its input has Keras hang a mask on it.

    Args:
        batch: any structure of tensors and ``None``.
    """
    return tree.map_structure(lambda leaf: None if leaf is None else tf.identity(leaf), batch)


def tensors(batch: Any) -> Any:
    """Arrays as tensors, of Keras's float type if they hold floats, as ``fit`` makes them; SciPy's matrices as sparse.

    Args:
        batch: any structure of arrays, tensors and ``None``.
    """

    def tensor(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, (tf.SparseTensor, tf.RaggedTensor)):
            return leaf
        if hasattr(leaf, "tocoo"):
            coo = leaf.tocoo()
            indices = tf.cast(tf.stack([coo.row, coo.col], 1), "int64")
            return tf.sparse.reorder(tf.SparseTensor(indices, tensor(coo.data), coo.shape))
        try:
            dense = tf.convert_to_tensor(leaf)
        except (TypeError, ValueError):
            raise ValueError(
                f"`x`, `y` and `sample_weight` must hold arrays or tensors. Received: {leaf!r} of {type(leaf)}"
            ) from None
        return tf.cast(dense, keras.config.floatx()) if dense.dtype.is_floating else dense

    return tree.map_structure(tensor, batch)


def joined(batches: list[Any]) -> Any:
    """One batch of all the rows of several.

    Args:
        batches: tuples of (x, y, sample_weight), of tensors.

    Raises:
        ValueError: they do not fit together, such as sentences padded to different lengths.
    """

    def join(*leaves: Any) -> Any:
        if leaves[0] is None:
            return None
        try:
            if isinstance(leaves[0], tf.SparseTensor):
                return tf.sparse.concat(0, list(leaves))
            return tf.concat(leaves, 0)
        except tf.errors.InvalidArgumentError:
            shapes = sorted({tuple(leaf.shape) for leaf in leaves}, key=str)
            raise ValueError(
                "`x` must be a data set whose batches differ in their number of examples only, since they are joined: "
                f"pad all to one length (`padded_batch` has `padded_shapes`). Received: batches of shapes {shapes}"
            ) from None

    return tree.map_structure(join, *batches)


def divisible(batch: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """The same batch in tensors that have a row for each example.

    Args:
        batch: what :func:`unpacked` returned.

    Raises:
        ValueError: a tensor has no rows, or not as many as the first one. Where numbers of rows are not static, it is
            TensorFlow's ``InvalidArgumentError`` when the graph runs, and nothing is computed from the batch.
    """
    composite = (tf.SparseTensor, tf.RaggedTensor)
    x, y, sample_weight = tree.map_structure(
        lambda leaf: leaf if leaf is None or isinstance(leaf, composite) else tf.convert_to_tensor(leaf), batch
    )
    named = [
        ("".join([name, *(f"[{key!r}]" for key in path)]), leaf)
        for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight))
        for path, leaf in (tree.flatten_with_path(part) if tree.is_nested(part) else [((), part)])
        if leaf is not None
    ]
    first, count = named[0][0], _rows(named[0][1])
    checks = []
    for name, leaf in named:
        rows = _rows(leaf)
        words = (
            f"`micro_batches` divides every tensor by rows, one for each example, and `{name}` has not as many rows as "
            f"`{first}`. Leave `micro_batches` at 1, where nothing is divided; or give `{name}` a row for each "
            "example (tf.repeat, if all examples share one); or feed smaller batches to an optimizer wrapped in "
            "companion.GradientAccumulation."
        )
        if rows is None or count is None or (isinstance(rows, int) and isinstance(count, int) and rows != count):
            raise ValueError(
                f"{words} Received: {name} with {'no' if rows is None else rows} rows, of shape {tuple(leaf.shape)}; "
                f"{first} with {'no' if count is None else count} rows"
            )
        if not (isinstance(rows, int) and isinstance(count, int)) and leaf is not named[0][1]:
            checks.append(tf.debugging.assert_equal(rows, count, f"{words} Received: (rows of {name}, of {first})"))
    if not checks or tf.executing_eagerly():
        return x, y, sample_weight
    with tf.control_dependencies(checks):
        return tree.map_structure(lambda leaf: None if leaf is None else tf.identity(leaf), (x, y, sample_weight))


def part_of(tensor: Any, begin: Any, size: Any) -> Any:
    """``size`` rows from ``begin`` on; fewer at the end. Of static size wherever ``size`` is.

    Args:
        tensor: dense, sparse or ragged.
        begin: the first row.
        size: how many.
    """
    if isinstance(tensor, tf.RaggedTensor):
        return tensor[begin : begin + size]
    rest = list(tensor.shape[1:])
    if isinstance(tensor, tf.SparseTensor):
        lengths = [tensor.dense_shape[axis + 1] if n is None else tf.cast(n, "int64") for axis, n in enumerate(rest)]
        zeros = [tf.zeros((), "int64")] * len(rest)
        found = tf.sparse.slice(
            tensor, tf.stack([tf.cast(begin, "int64"), *zeros]), tf.stack([tf.cast(size, "int64"), *lengths])
        )
        count = tf.constant(size, "int64") if isinstance(size, int) else found.dense_shape[0]
        return tf.SparseTensor(found.indices, found.values, tf.stack([count, *lengths]))
    if isinstance(size, int):
        return tf.ensure_shape(tf.slice(tensor, [begin, *[0] * len(rest)], [size, *[-1] * len(rest)]), [size, *rest])
    # Not past the end, which XLA would count: there `tf.shape` of the last part would be that of a whole one.
    return tensor[begin : tf.minimum(begin + size, tf.shape(tensor)[0])]


def sum_over_parts(
    n: Any, parts: int, state: list[Any] | None, part: Callable[..., Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Calls a function on one part after the other, adds its sums up, joins its rows, and hands its state on.

    Args:
        n: the number of rows.
        parts: into how many they are divided.
        state: what the first part starts from.
        part: a function of ``(begin, size, state)`` that returns sums, rows and the next state.

    Returns:
        The sums, the rows, and the last state.
    """
    if parts == 1:
        size, count, rest = n, 1, 0
    elif isinstance(n, int):  # every shape is static, as XLA wants it: what is left is one more part, by itself
        size = -(-n // parts)
        count, rest = divmod(n, size) if n else (1, 0)
    else:
        size = tf.maximum(-(-n // parts), 1)
        count, rest = tf.maximum(-(-n // size), 1), 0
    sums, rows, state = part(0, size, state)
    pieces = [[row] for row in rows]
    if not isinstance(count, int) or count > 1:
        shapes = [tf.TensorShape([None, *row.shape[1:]]) for row in rows]
        arrays = [
            tf.TensorArray(row.dtype, count - 1, infer_shape=False, element_shape=shape)
            for row, shape in zip(rows, shapes, strict=True)
        ]

        def body(index: Any, sums: Any, state: Any, arrays: Any) -> Any:
            more, rows, state = part(index * size, size, state)
            arrays = [array.write(index - 1, row) for array, row in zip(arrays, rows, strict=True)]
            return index + 1, _add(sums, more), state, arrays

        start = _after([*sums, *rows], 1), sums, state, arrays
        _, sums, state, arrays = tf.while_loop(lambda i, *_: i < count, body, start, parallel_iterations=1)
        pieces = [[*piece, array.concat()] for piece, array in zip(pieces, arrays, strict=True)]
    if rest:
        more, rows, state = part(_after([*sums, *rows], count * size), rest, state)
        sums, pieces = _add(sums, more), [[*piece, row] for piece, row in zip(pieces, rows, strict=True)]
    return sums, [tf.concat(piece, 0) for piece in pieces], state or []


def _add(sums: list[Any], more: list[Any]) -> list[Any]:
    return [total + term for total, term in zip(sums, more, strict=True)]


def _after(tensors: list[Any], begin: Any) -> Any:
    """``begin``, but not before the tensors are there. Otherwise parts would run, and take memory, side by side."""
    with tf.control_dependencies(tensors):
        return tf.identity(begin)


def _rows(tensor: Any) -> Any:
    """An integer where that is static; ``None`` where there are no rows."""
    shape = tensor.shape
    if shape is not None and getattr(shape, "rank", len(shape)) == 0:
        return None
    if isinstance(shape, tf.TensorShape) and (shape.rank is None or shape[0] is None):
        if isinstance(tensor, tf.RaggedTensor):
            return tf.cast(tensor.nrows(), "int32")
        return tf.cast(tf.shape(tensor)[0], "int32")
    return int(shape[0])
