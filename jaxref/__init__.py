"""The third oracle: a pure-functional forward of Qwen2 and Qwen3 in JAX that returns every intermediate by name."""

from typing import TYPE_CHECKING

from weights.lazily import lazily

if TYPE_CHECKING:
    from jaxref.home import to_numpy
    from jaxref.loaded import load_tree
    from jaxref.made import make_tree
    from jaxref.model import forward
    from jaxref.session import Session
    from jaxref.stages import STAGES

__all__ = ["STAGES", "Session", "forward", "load_tree", "make_tree", "to_numpy"]

_HOME = {
    "jaxref.home": ("to_numpy",),
    "jaxref.loaded": ("load_tree",),
    "jaxref.made": ("make_tree",),
    "jaxref.model": ("forward",),
    "jaxref.session": ("Session",),
    "jaxref.stages": ("STAGES",),
}

__getattr__ = lazily(__name__, _HOME)
