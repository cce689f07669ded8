"""The abstract noise layer with its rate, and its place in a state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tikhon.arguments import check_flag
from tikhon.layers.masks import check_rate
from tikhon.layers.paths import path_in_running_model


class NoiseLayer(nn.Module):
    """A layer that draws noise in training mode, at a rate held in a buffer.

    A buffer may change between steps without recompilation, and may be stacked by
    `torch.func.stack_module_state`: one rate for each member of a population. The state dict has
    no key for it, like that of torch's dropout, so checkpoints load both ways under `strict=True`;
    the rate travels in the state dict's metadata, which `torch.save` keeps.
    `generator` replaces torch's global source of random numbers (eager mode only). `path` is the
    layer's place in the model that a verb walked over last, for messages. A kind of noise is one
    `_function` of `tikhon.layers.functional` and the names of the `_options` that it takes. A rate
    out of range raises ValueError.
    """

    _function: ClassVar[Callable[..., Tensor]]
    _options: ClassVar[tuple[str, ...]] = ()
    upper: ClassVar[float] = 1.0  # the rate is in [0, upper]
    closed: ClassVar[bool] = True  # whether `upper` itself is a rate
    rowwise: bool = True  # the noise of one row does not depend on the other rows

    rate: Tensor

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.generator: torch.Generator | None = None
        self.path = ""
        name = type(self).__name__
        self._hold(check_rate(rate, name, upper=self.upper, closed=self.closed))

    def _hold(self, rate: float) -> None:
        buffer = torch.tensor(rate, dtype=torch.float32)
        if buffer.is_meta:  # created under torch.device("meta"), which would lose the value
            buffer = torch.tensor(rate, dtype=torch.float32, device="cpu")
        self.register_buffer("rate", buffer, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The noisy `x` in training mode, its mean otherwise."""
        given = {name: getattr(self, name) for name in self._options}
        return type(self)._function(x, self.rate, **given, **self.draws)

    @property
    def draws(self) -> dict[str, Any]:
        """Whether and from what a function of noise draws."""
        return {"training": self.training, "generator": self.generator}

    @property
    def label(self) -> str:
        """The path in the running or last visited model, if any, and the class."""
        name, path = type(self).__name__, path_in_running_model(self) or self.path
        return f"{path} ({name})" if path else name

    def check(self, rate: float | Tensor) -> float:
        """`rate` as a float in this layer's range, or an error that names the layer's path."""
        return check_rate(rate, self.label, upper=self.upper, closed=self.closed)

    def set_rate(self, rate: float | Tensor) -> None:
        """Set the rate in the buffer, in place."""
        self.rate.fill_(self.check(rate))

    @property
    def p(self) -> float:
        """The rate under the name of torch's layers; to set it is `set_rate`."""
        return self.rate.mean().item()

    @p.setter
    def p(self, rate: float | Tensor) -> None:
        self.set_rate(rate)

    def extra_repr(self) -> str:
        """Return the rate as a constructor argument."""
        return f"rate={self.rate.mean().item():.4g}"

    def _apply(self, fn, recurse: bool = True):
        # `model.bfloat16()` would turn a rate of 0.999 into 1, `to_empty` and the meta device
        # would lose it: the number stays, and follows to other devices
        rate = self._buffers.get("rate")
        super()._apply(fn, recurse)
        if rate is not None and self.rate is not rate:
            self.rate = rate if self.rate.is_meta else rate.to(self.rate.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and "rate" in self._buffers:
            metadata[prefix[:-1]]["rate"] = self.rate.detach().clone()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs) -> None:
        if "rate" in self._buffers:
            rate = state_dict.pop(prefix + "rate", local_metadata.get("rate"))
            if rate is not None:  # a checkpoint without rates keeps the current one
                self.rate.copy_(rate)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)


class TorchDropout(NoiseLayer):
    """A layer that takes what torch's layer of the same name takes.

    `p` is another name of the rate. `inplace` writes the result into the input in training mode;
    unlike torch's it saves no memory.
    """

    writes_input: ClassVar[bool] = True  # whether torch's layer regards `inplace`
    inplace: bool

    def __init__(
        self, rate: float = 0.5, inplace: bool = False, *, p: float | None = None
    ) -> None:
        super().__init__(rate if p is None else p)
        self.inplace = check_flag(self.label, "inplace", inplace)

    def forward(self, x: Tensor) -> Tensor:
        """The noisy `x` in training mode, `x` otherwise."""
        noisy = super().forward(x)
        in_place = self.inplace and self.writes_input and self.training
        return x.copy_(noisy) if in_place else noisy

    def extra_repr(self) -> str:
        """Return the constructor arguments."""
        return super().extra_repr() + (", inplace=True" if self.inplace else "")
