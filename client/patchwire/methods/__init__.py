"""Experiments of mechanistic interpretability, as short functions over the public tracing API.

Each works on every architecture that has the sites it names, and returns a small result with labelled axes, numbers as
tensors, a `table()` for the terminal and a `plot()`.
"""

from __future__ import annotations

from patchwire.methods.lens import LogitLens, logit_lens
from patchwire.methods.measured import Measured
from patchwire.methods.patching import ResidualPatching, residual_patching

__all__ = ["LogitLens", "Measured", "ResidualPatching", "logit_lens", "residual_patching"]
