"""The fixtures that any test may ask for."""

from tests.kit.dtypes import dtype_put_back, float64

__all__ = ["dtype_put_back", "float64"]
