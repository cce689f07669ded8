"""From exact zeros to a smaller dense model with equal outputs."""

from .compacting import Compaction, compact
from .latency import speedup

__all__ = ["Compaction", "compact", "speedup"]
