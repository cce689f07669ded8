"""The arguments of `sparsify` as a value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tikhon.arguments import check_number, is_count, is_one_of
from tikhon.errors import describe, unknown_name
from tikhon.regularizer.targets import Pattern
from tikhon.sparsity.allocation import Per

Of = Literal["weights", "channels", "heads", "features", "ranks"]
Cost = Literal["flops"]


@dataclass(frozen=True)
class Thinning:
    """What to remove, how much and when, as arguments of `sparsify`.

    Raises ValueError for arguments out of their range.

    >>> Thinning.of_text("50%,of=channels,multiple=8").plain()
    {'share': 0.5, 'of': 'channels', 'multiple': 8}
    """

    share: float
    of: Of = "weights"
    pattern: Pattern = "*"
    per: Per | None = None
    cost: Cost | None = None
    multiple: int = 1
    warmup: float = 0.1
    repair: float = 0.5

    def __post_init__(self) -> None:
        if not is_one_of(self.of, get_args(Of)):
            raise ValueError(f"sparsify: {unknown_name('kind of unit', self.of, get_args(Of))}")
        rules = {
            "per": (is_one_of(self.per, (None, *get_args(Per))), "'model' or 'layer'"),
            "cost": (is_one_of(self.cost, (None, *get_args(Cost))), "None or 'flops'"),
        }
        for name, (fine, rule) in rules.items():
            if not fine:
                received = describe(getattr(self, name))
                raise ValueError(f"sparsify: {name} must be {rule}, received {received}")
        self._validate_number("share", "in (0, 1): what goes", lambda share: 0 < share < 1)
        self._validate_number("multiple", "1 or more", is_count, whole=True)
        self._validate_number("warmup", "in [0, 1)", lambda part: 0 <= part < 1)
        most = 1 - self.warmup
        allowed = "in [0, 1), and less than 1 - warmup"
        self._validate_number("repair", allowed, lambda part: 0 <= part < most)
        if self.cost is not None and self.per == "layer":
            raise ValueError(
                "sparsify: a share of the flops is one of the whole model: leave out per='layer'"
            )

    def _validate_number(
        self, name: str, allowed: str, fine: Callable[[Any], bool], *, whole: bool = False
    ) -> None:
        try:
            number = check_number(
                "sparsify", name, getattr(self, name), allowed, fine, whole=whole
            )
        except TypeError as error:  # may be a word from the command line
            raise ValueError(str(error)) from None
        object.__setattr__(self, name, number)

    @property
    def resolved_per(self) -> Per:
        """Return "model" or "layer": `per`, or the default for the kind of unit."""
        over = self.cost is not None or self.of in ("weights", "ranks")
        return self.per or ("model" if over else "layer")

    def plain(self) -> dict[str, Any]:
        """Return plain values that differ from the defaults."""
        return {
            item.name: value
            for item in dataclasses.fields(self)
            if (value := getattr(self, item.name)) != item.default
        }

    @classmethod
    def read(cls, given: ThinningLike) -> Thinning:
        """Read a share, a text such as "90%" or "50%,of=channels", or a table of arguments."""
        if isinstance(given, Thinning):
            return given
        if isinstance(given, str):
            return cls.of_text(given)
        if not isinstance(given, Mapping):
            return cls(given)
        known = [item.name for item in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(f"sparsify: {unknown_name('setting', key, known)}")
        if "share" not in given:
            raise ValueError("sparsify: share is missing: the part that goes, in (0, 1)")
        return cls(**given)

    @classmethod
    def of_text(cls, text: str) -> Thinning:
        """Parse "SHARE[,KEY=VALUE]", with the share as 0.9 or 90%."""
        first, *rest = [part.strip() for part in text.split(",")]
        found: dict[str, object] = {"share": _number(first)}
        for part in rest:
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"sparsify: expected KEY=VALUE, received {part!r}")
            found[key.strip()] = _number(value.strip())
        return cls.read(found)


ThinningLike = Thinning | float | str | Mapping[str, Any]  # what `Thinning.read` takes


def _number(text: str) -> object:
    if re.fullmatch(r"\d+", text):
        return int(text)
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return text
