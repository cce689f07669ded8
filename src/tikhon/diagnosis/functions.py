"""Functions of torch, by name, that what is seen of a program and the checks both ask about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]  # of torch, as function modes are handed it

COMPARED = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"}
BINARY = {"binary_cross_entropy", "binary_cross_entropy_with_logits"}
ONE_SIDED = {*BINARY, "poisson_nll_loss", "cross_entropy", "kl_div"}  # (answer, target), not back
JUDGES = {*COMPARED, *BINARY, *("cross_entropy", "nll_loss", "kl_div", "cosine_embedding_loss")}
ATTENDING = {"softmax", "scaled_dot_product_attention"}  # of a row of -inf they make NaN
