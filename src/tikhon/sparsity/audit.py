"""The audit of `sparsify`: a table and a plot of the zeros."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tikhon import plotting

RETURNED = "set by something else, as another optimizer or load_state_dict"


@dataclass(frozen=True)
class LayerShare:
    """One layer of the audit."""

    layer: str
    units: int
    zeros: int

    @property
    def share(self) -> float:
        """Share of the units that are exactly zero."""
        return self.zeros / max(1, self.units)


@dataclass(frozen=True)
class Sparsity:
    """Requested and achieved sparsity; prints as a table."""

    of: str
    asked: float
    phase: str
    step: int
    steps: int
    end: int  # the last step with removals
    layers: tuple[LayerShare, ...]
    cost: str | None = None
    saved: float | None = None  # share of the cost saved
    returned: int = 0  # removed units that are no longer zero

    @property
    def share(self) -> float:
        """Share of all units that are exactly zero."""
        return sum(x.zeros for x in self.layers) / max(1, sum(x.units for x in self.layers))

    def to_dict(self) -> dict[str, object]:
        """Return plain values, for JSON."""
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        width = max([len("layer"), *(len(x.layer) for x in self.layers)])
        asked = f"{self.asked:.2%} asked"
        if self.saved is not None:
            asked = f"{self.saved:.2%} of the {self.cost} went, {asked}"
        lines = [
            f"{self.share:.2%} of the {self.of} are zero ({asked}); "
            f"{self.phase}, step {self.step} of {self.steps}",
            f"{'layer':<{width}}  {self.of:>9}  {'zero':>9}  share",
        ]
        lines += [
            f"{x.layer:<{width}}  {x.units:>9,}  {x.zeros:>9,}  {x.share:.1%}" for x in self.layers
        ]
        if self.returned:
            lines.append(f"{self.returned:,} that had gone are not zero: {RETURNED}")
        return "\n".join(lines)

    def plot(self, *, ax: Any = None) -> plotting.Display:
        """Plot the units left in each layer, in %, with their number.

        On the matplotlib axes `ax`, or a new figure; InputError without matplotlib.
        """
        display = plotting.canvas(ax, *([] if ax is not None else [max(1, len(self.layers) / 12)]))
        shown, names = display.ax_, [x.layer for x in self.layers]
        whole, left = [100.0] * len(names), [100 * (1 - x.share) for x in self.layers]
        plotting.bars(
            shown, names, whole, x=f"{self.of} left, %", colours=["#e2e8f0"] * len(names)
        )
        shown.barh(range(len(names)), left, color=plotting.BLUE)
        for place, x in enumerate(self.layers):
            label = f"{x.units - x.zeros:,} of {x.units:,}"
            shown.text(99, place, label, ha="right", va="center", fontsize="small")
        shown.set(xlim=(0, 100))
        shown.set_title(f"{self.share:.1%} of the {self.of} are zero")
        return display
