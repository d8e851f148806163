"""The shapes in jaxref's signatures are checked while the tests run."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxref.ops import linear
from jaxref.precision import NUMERICS


def test_a_wrong_shape_is_refused_by_its_signature() -> None:
    x, weight = np.zeros((3, 4), np.float32), np.zeros((5, 7), np.float32)
    with pytest.raises(TypeCheckError, match="weight"):
        linear(x, weight, numerics=NUMERICS["float32"])
