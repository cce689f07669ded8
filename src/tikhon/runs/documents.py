"""What the JSON documents of runs hold, for those who read them.

`result.json` differs from verb to verb and from version to version, so a reader asks it for what
it needs; these are the parts that have a fixed shape. None stands where a number was not finite.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

Number = float | None
Epoch = dict[str, Number]  # a row of the history: "epoch", "valid/loss", "penalty/l1/zeros"


class SavedPenalty(TypedDict, total=False):
    """One penalty at the end of a run; `verdict` and `slope` of a strength that adapted."""

    strength: Number
    how: str
    value: Number
    zeros: Number
    verdict: str
    slope: float


class SavedHistogram(TypedDict):
    """A histogram of the weights that are not zero: one edge more than counts."""

    edges: list[float]
    counts: list[int]


class SavedWeights(TypedDict, total=False):
    """One parameter at the end of a run."""

    zeros: Number
    l1: Number
    l2: Number
    histogram: SavedHistogram


class SavedLayer(TypedDict):
    """What `sparsify` left of one layer."""

    layer: str
    units: int
    zeros: int


class SavedSparsity(TypedDict):
    """What `sparsify` left; `of` names the units."""

    of: str
    layers: list[SavedLayer]


class SavedSentence(TypedDict):
    """What gives a sentence in any language: its key, and values that may be sentences again."""

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
    cause: str


class SavedSite(TypedDict):
    """One place in the network that was measured."""

    name: str
    kind: str
    role: str


class SavedProbe(TypedDict):
    """All sites at one step, each a dictionary of numbers."""

    step: int
    readings: list[dict[str, Number]]


class SavedPoint(TypedDict):
    """The losses at one step of the dry run."""

    step: int
    loss: Number
    eval_loss: Number
    valid_loss: Number
    metric: Number


class SavedRecord(TypedDict, total=False):
    """What `diagnose` measured."""

    model: str
    parameters: int
    steps: int
    loss: object
    sites: list[SavedSite]
    probes: list[SavedProbe]
    points: list[SavedPoint]
    reference: dict[str, Number]


class SavedTreatment(TypedDict):
    """What `cure` tried, and what came of it with every seed."""

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
    """How far the choice of a search may be off."""

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
