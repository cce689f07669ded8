"""Names of torch functions that both the recorders and the checks look for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]  # of torch, as passed to function modes

ADDING = {"add", "sub", "__add__", "__sub__", "__radd__", "__rsub__", "rsub", "subtract"}
TIMES = {"mul", "__mul__", "__rmul__", "multiply"}
SHARES = {"div", "__truediv__", "true_divide"}  # linear if the divisor is a number
PRODUCTS = {"matmul", "__matmul__", "mm"}
COMPARED = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"}
BINARY = {"binary_cross_entropy", "binary_cross_entropy_with_logits"}
ONE_SIDED = {*BINARY, "poisson_nll_loss", "cross_entropy", "kl_div"}  # output first, then target
JUDGES = {*COMPARED, *BINARY, *("cross_entropy", "nll_loss", "kl_div", "cosine_embedding_loss")}
ATTENDING = {"softmax", "scaled_dot_product_attention"}  # NaN for a row of -inf
