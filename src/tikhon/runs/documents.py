"""Types of the JSON documents of runs, for readers.

`result.json` differs by command and version, so readers access most of it dynamically; these
parts have a fixed shape. Non-finite numbers are stored as None.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

Number = float | None
Epoch = dict[str, Number]  # one row of the history: "epoch", "valid/loss", "penalty/l1/zeros"


class SavedPenalty(TypedDict, total=False):
    """One penalty at the end of a run, with `verdict` and `slope` for an adapted strength."""

    strength: Number
    how: str
    value: Number
    zeros: Number
    verdict: str
    slope: float


class SavedHistogram(TypedDict):
    """A histogram of the non-zero weights, with one more edge than counts."""

    edges: list[float]
    counts: list[int]


class SavedWeights(TypedDict, total=False):
    """One parameter at the end of a run."""

    zeros: Number
    l1: Number
    l2: Number
    histogram: SavedHistogram


class SavedLayer(TypedDict):
    """Sparsity of one layer after `sparsify`."""

    layer: str
    units: int
    zeros: int


class SavedSparsity(TypedDict):
    """Result of `sparsify`; `of` names the units."""

    of: str
    layers: list[SavedLayer]


class SavedSentence(TypedDict):
    """A translatable sentence: its key, and values that may be sentences too."""

    key: str
    values: dict[str, str | float | SavedSentence]


class SavedFinding(TypedDict):
    """One finding of a diagnosis."""

    code: str
    severity: str
    where: list[str]
    evidence: dict[str, object]
    why: str
    effect: str
    sentences: NotRequired[dict[str, SavedSentence]]
    advice: list[str]
    fix: NotRequired[str]
    cause: str


class SavedSite(TypedDict):
    """One measured place in the network."""

    name: str
    kind: str
    role: str


class SavedProbe(TypedDict):
    """Readings of all sites at one step."""

    step: int
    readings: list[dict[str, Number]]


class SavedPoint(TypedDict):
    """Losses at one step of the dry run."""

    step: int
    loss: Number
    eval_loss: Number
    valid_loss: Number
    metric: Number


class SavedRecord(TypedDict, total=False):
    """Measurements of `diagnose`."""

    model: str
    parameters: int
    steps: int
    loss: object
    sites: list[SavedSite]
    probes: list[SavedProbe]
    points: list[SavedPoint]
    reference: dict[str, Number]


class SavedTreatment(TypedDict):
    """A treatment tried by `cure`, with its effect for each seed."""

    name: str
    steps: int
    scores: list[Number]
    effect: Number
    effects: list[float]
    verdict: str


class SavedTrial(TypedDict):
    """One trial of a search on one rung."""

    config: dict[str, object]
    budget: int
    score: Number
    error: NotRequired[Number]
    curve: NotRequired[list[tuple[float, Number]]]
    strengths: NotRequired[dict[str, object]]


class SavedAudit(TypedDict, total=False):
    """Uncertainty of a search's choice."""

    worth_it: bool
    edges: list[str]
    gain: Number
    gain_error: Number
    default_score: Number
    default_epoch: int
    chosen_score: Number
    noise: float
    failed: int
    candidates: int
