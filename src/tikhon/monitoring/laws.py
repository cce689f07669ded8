"""Rules of a training step that a loop violates, each with the line to change.

Pure functions of plain values. A rule needs `ENOUGH` successive sampled steps, or two once the
loop has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

from tikhon.languages import sentence
from tikhon.monitoring.history import ONCE, StepHistory, Streak

ENOUGH = 3  # successive sampled steps
NOTHING = 1e-5  # of the largest gradient: rounding errors of a zero gradient
KEPT = 10  # sampled steps whose graphs are alive
MANY = 20  # steps, or forward passes, without a required event


@dataclass(frozen=True)
class Alarm:
    """One rule that a loop violates.

    `step` is the first step that showed it, `where` the tensors, `meaning` the effect on training,
    `change` the line to change; `severity` is "warning" or "info".
    """

    code: str
    step: int
    meaning: str
    change: str
    where: tuple[str, ...] = ()
    severity: str = "warning"

    def __str__(self) -> str:
        tensors = f" ({_few(self.where)})" if self.where else ""
        return f"since step {self.step}{tensors}: {self.meaning}; {self.change}"

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Loop:
    """State of a loop: counts over all steps, and the history of the sampled ones."""

    steps: int
    forwards: int  # passes of the model that built a graph
    backwards: bool  # the model has a gradient
    empty: int  # successive steps in which no tensor of the optimizer had a gradient
    frozen: frozenset[str]  # tensors that did not require a gradient when the watch began
    ended: bool
    history: StepHistory
    again: int = 0  # steps without a pass, along the gradient of the previous step
    unstepped: int = 0  # backward passes since steps became rare
    usual: int = 0  # the most forward passes between two steps
    rounds: bool = False  # loaded weights are means over several clients
    learned: bool = False  # a plateau lowered the rate after many epochs had been the best

    @property
    def summed(self) -> bool:
        """Whether a step sums micro-batches whose losses were not divided."""
        return self.lasts(self.history.streak("summed"))

    def lasts(self, streak: Streak, enough: int = ENOUGH) -> bool:
        """Whether a streak is long enough to be reported."""
        shortest = 2 if enough <= ENOUGH else ENOUGH
        return streak.count >= (min(shortest, enough) if self.ended else enough)


Law = Callable[[Loop], Alarm | None]


def alarms(loop: Loop) -> list[Alarm]:
    """Return the violated rules, causes before consequences; at most one alarm per rule."""
    return list(_broken(loop))


def _broken(loop: Loop) -> Iterator[Alarm]:
    first = [found for law in ROOTS if (found := law(loop)) is not None]
    yield from first[:1]
    for law in OTHERS:
        found = law(loop)
        if found is not None:
            yield found


def _steady(
    sign: str,
    code: str,
    meaning: str,
    change: str,
    *,
    now_and_then: bool = False,
    enough: int = ENOUGH,
) -> Law:
    """Return a rule that is violated while a sign lasts, or if it recurs `now_and_then`.

    The meaning may format figures of the `last` sampled step.
    """

    def law(loop: Loop) -> Alarm | None:
        streak = loop.history.streak(sign)
        often = loop.history.often(sign) if now_and_then else None
        if often is None and not loop.lasts(streak, enough):
            return None
        told = meaning.format(last=loop.history.last)
        return Alarm(code, (often or streak).first, told, change)

    return law


beside_the_model = _steady(
    "beside",
    "loss_not_connected",
    "the weights have gradients, but none comes through an output of a layer: only a penalty on "
    "the weights is trained",
    "compute the loss from model(x) itself, without .item(), .detach() or argmax",
)
clipped_late = _steady(
    "clipped late",
    "clipped_after_step",
    "the gradients are changed after the step that used them and before the next pass: clipping "
    "there does nothing",
    "call clip_grad_norm_ between loss.backward() and optimizer.step()",
)
not_cleared = _steady(
    "stale",
    "gradients_not_cleared",
    "the gradients are not cleared: each step moves along the sum of all gradients so far",
    "call optimizer.zero_grad() once a step, before loss.backward()",
    now_and_then=True,
)
mixed = _steady(
    "mixed",
    "gradients_of_another_loss",
    "the gradient that a pass for another optimizer left before that one's step is not cleared: "
    "this step moves along both losses",
    "call optimizer.zero_grad() of this optimizer right before its own backward pass, or "
    ".detach() what the other loss takes from this model",
    now_and_then=True,
)
late_backward = _steady(
    "late",
    "step_before_backward",
    "the step comes before the backward pass of its batch: it moves along the gradient of the "
    "batch before",
    "call loss.backward() before optimizer.step()",
)
eval_mode = _steady(
    "eval",
    "eval_mode_in_training",
    "the model trains in eval mode: dropout is off and BatchNorm keeps its old statistics",
    "call model.train() before the training batches, after every evaluation",
)
crushed = _steady(
    "crushed",
    "clipped_before_unscaling",
    "the gradients are clipped while they are scaled by {last.scale:.0f}: what the step follows "
    "has a norm of {last.size:.0e}",
    "call scaler.unscale_(optimizer) before clipping",
)
scaled = _steady(
    "scaled",
    "step_of_scaled_gradients",
    "the step follows gradients that are still scaled by {last.scale:.0f}",
    "call scaler.step(optimizer) in place of optimizer.step()",
)
lost = _steady(
    "lost",
    "micro_batches_lost",
    "a step follows {last.backwards} backward passes, but the gradients are cleared between them: "
    "only the last micro-batch counts",
    "call optimizer.zero_grad() once a step, where optimizer.step() is called",
)
other_model = _steady(
    "foreign",
    "optimizer_of_another_model",
    "none of the {last.held} tensors of the optimizer is a parameter of this model, which does "
    "not move: it was built for another, perhaps an older, model",
    "build the optimizer from model.parameters() after the last line that makes, wraps or moves "
    "the model",
)
apart = _steady(
    "apart",
    "replicas_differ",
    "the weights of the processes differ by {last.apart:.0e} of their size: each trains a model "
    "of its own",
    "call the DistributedDataParallel module, not its .module, and change weights on every "
    "process alike",
    enough=2,
)


def step_never_called(loop: Loop) -> Alarm | None:
    """Detect forward passes without an optimizer step."""
    if loop.steps or loop.forwards < (1 if loop.ended else 5 * MANY):
        return None
    lacking = "" if loop.backwards else " and no backward pass reached the model"
    return Alarm(
        "step_never_called",
        0,
        sentence("told_forwards", count=loop.forwards)
        + f", but this optimizer never made a step{lacking}: the weights stay as they are",
        "call optimizer.step() of the optimizer that is watched, after loss.backward(), "
        "and build it once, before the loop",
    )


def steps_ended(loop: Loop) -> Alarm | None:
    """Detect optimizer steps that cease while passes go on."""
    if not loop.steps or loop.unstepped < max(3 * MANY, 5 * loop.usual):
        return None
    return Alarm(
        "step_never_called",
        loop.steps,
        f"{loop.unstepped} backward passes since this optimizer made its last step: the weights "
        "stay as they are, or another optimizer moves them",
        "build the optimizer once, before the loop, and step the one that is watched",
    )


def stepped_again(loop: Loop) -> Alarm | None:
    """Detect several steps along the same gradient."""
    if loop.again < ENOUGH + 2 or loop.again < 0.3 * loop.steps:
        return None
    return Alarm(
        "stepped_twice",
        0,
        f"{loop.again} of {loop.steps} steps follow the gradient of the step before, without a "
        "pass in between: the learning rate is in truth a multiple of what is set",
        "call optimizer.step() once after each backward pass; scaler.step(optimizer) calls it",
    )


def thawed(loop: Loop) -> Alarm | None:
    """Detect frozen tensors that still move."""
    names = _lasting(loop, loop.history.thawed)
    if not names:
        return None
    return Alarm(
        "frozen_but_moving",
        min(loop.history.thawed[n].first for n in names),
        "they do not require a gradient any more, but have an old one, which the optimizer "
        "follows on, with its momentum and decay",
        "set their .grad to None when they are frozen, and take them out of the optimizer",
        tuple(names),
    )


def frozen_in_name(loop: Loop) -> Alarm | None:
    """Detect modules with an attribute `requires_grad`, which torch ignores."""
    last = loop.history.last
    if last is None or not last.called_frozen:
        return None
    return Alarm(
        "frozen_in_name",
        loop.history.first_step,
        "requires_grad = False was set on the module, which changes nothing: its tensors require "
        "gradients and move",
        "call module.requires_grad_(False), which freezes its parameters",
        last.called_frozen,
    )


def graphs_kept(loop: Loop) -> Alarm | None:
    """Detect losses or outputs that are kept with their graphs."""
    last = loop.history.last
    if last is None or last.graphs < KEPT:
        return None
    return Alarm(
        "graphs_kept",
        0,
        f"the graphs of {last.graphs} earlier sampled steps are still in memory: something keeps "
        "their losses or outputs",
        "add up loss.item(), and keep outputs as .detach()",
        severity="info",
    )


def never_called(loop: Loop) -> Alarm | None:
    """Detect a loop without passes or steps."""
    if not loop.ended or loop.steps or loop.forwards:
        return None
    return Alarm(
        "nothing_happened",
        0,
        "neither the model was called nor the optimizer stepped",
        "watch the model and the optimizer that the loop uses",
        severity="info",
    )


def no_gradient(loop: Loop) -> Alarm | None:
    """Detect steps without a gradient, and infer the reason from the order of the passes."""
    history, last = loop.history, loop.history.last
    if loop.empty >= (2 if loop.ended else MANY):
        said = f"{loop.empty} steps, no parameter of this optimizer had a gradient"
        step = max(0, loop.steps - loop.empty)
    elif loop.lasts(history.streak("zero")):
        step = history.streak("zero").first
        said = "every gradient of this optimizer is exactly zero"
    else:
        return None
    if last is None or not last.listening:
        why, change = "no step changes a weight", "check that loss.backward() runs before the step"
    elif last.reached.get("optimizer") and last.unfinished:
        why = "the step comes before the backward pass"
        change = "call loss.backward() before optimizer.step()"
    elif last.reached.get("optimizer") and last.arrived:
        why = "they are cleared between the backward pass and the step"
        change = "move optimizer.zero_grad() before loss.backward(), or behind optimizer.step()"
    elif last.reached.get("optimizer"):
        why = "the loss does not depend on them (a constant, or a rounded or clamped output)"
        change = "compute the loss from model(x) with operations that have a gradient"
    elif last.reached.get("model"):
        why = "the backward pass reaches the model, but none of the optimizer's tensors"
        change = "build the optimizer from the parameters that the loss trains"
    else:
        why = "no backward pass reaches them: the loss is not connected to the model"
        change = (
            "compute the loss from model(x) itself, without .item(), .detach(), .data, argmax, "
            "numpy or a new torch.tensor, and call loss.backward()"
        )
    return Alarm("no_gradient", step, f"{said}: {why}", change)


def doubled(loop: Loop) -> Alarm | None:
    """Detect a tensor that is in the optimizer twice."""
    last = loop.history.last
    if last is None or not last.doubled:
        return None
    return Alarm(
        "duplicated_parameters",
        last.step,
        "they stand twice in the optimizer and move twice",
        "give each parameter to the optimizer once",
        last.doubled,
    )


def left_out(loop: Loop) -> Alarm | None:
    """Detect trainable tensors with a gradient that are in no optimizer."""
    last = loop.history.last
    if last is None or loop.lasts(loop.history.streak("foreign"), 1):
        return None
    names = _lasting(loop, loop.history.left_out)
    if not names:
        return None
    step = min(loop.history.left_out[n].first for n in names)
    late = [n for n in names if n in loop.frozen]
    meaning = "they get gradients, but are not in the optimizer and never move"
    if late:
        meaning = "they were unfrozen after the optimizer was built, which does not have them"
    return Alarm(
        "missing_from_optimizer",
        step,
        meaning,
        'add them with optimizer.add_param_group({"params": ...}), or freeze them with '
        "requires_grad_(False) if they are to stay",
        tuple(late or names),
    )


def unreached(loop: Loop) -> Alarm | None:
    """Detect tensors of the optimizer that never get a gradient."""
    history, last = loop.history, loop.history.last
    if last is None or loop.lasts(history.streak("zero")):
        return None
    silent = {n: last.tensors[n] for n in _lasting(loop, history.silent) if n in last.tensors}
    foreign = [n for n, t in silent.items() if t.foreign]
    if foreign and left_out(loop) is None:
        return Alarm(
            "optimizer_of_another_model",
            min(history.silent[n].first for n in foreign),
            "they are in the optimizer, but not in the model, and never get a gradient",
            "build the optimizer after the last line that changes the model's layers",
            tuple(foreign),
        )
    own = {n: t for n, t in silent.items() if not t.foreign}
    if not own:
        return None
    # the last bias cancels in differences of outputs, with gradient zero
    free = all(t.vector and t.gradient is not None for t in own.values())
    return Alarm(
        "unmoved_parameters",
        min(history.silent[n].first for n in own),
        "they never get a gradient, so they keep their first values: the loss does not reach "
        "them, or they are behind a detach, dead units or a branch that is not used",
        "let the loss depend on them, or take them out of the model",
        tuple(own),
        "info" if free else "warning",
    )


def unmoved(loop: Loop) -> Alarm | None:
    """Detect tensors of the optimizer that have a gradient but never move."""
    history, last = loop.history, loop.history.last
    names = _lasting(loop, history.still)
    if last is None or not names:
        return None
    kind = last.tensors[names[0]].kind if names[0] in last.tensors else ""
    half = kind in ("bfloat16", "float16")
    if not half and loop.lasts(history.streak("faded")):
        return None  # vanishing gradients are reported otherwise
    # a bias before a norm has no effect: its gradient is zero up to rounding
    largest = max((t.gradient or 0.0 for t in last.tensors.values()), default=0.0)
    read = [last.tensors[n] for n in names if n in last.tensors]
    free = not half and all(t.vector and (t.gradient or 0) < NOTHING * largest for t in read)
    moves = "most of their entries do not" if half else "never"
    cause = f"a step is below the resolution of {kind}" if half else "the step rounds to nothing"
    change = (
        "keep the weights in float32 and use torch.autocast"
        if half
        else ("raise the learning rate of their group")
    )
    return Alarm(
        "unmoved_parameters",
        min(history.still[n].first for n in names),
        f"they get a gradient and {moves} move: {cause}",
        change,
        tuple(names),
        "info" if free else "warning",
    )


def overwritten(loop: Loop) -> Alarm | None:
    """Detect weights that are overwritten between steps."""
    if loop.rounds:
        return None
    back, replaced = loop.history.streak("back"), loop.history.replaced
    change = "load, initialise or copy weights before the loop, not inside it"
    since = back.first if loop.lasts(back) else loop.history.set_back
    if since is not None:
        return Alarm(
            "weights_overwritten",
            since,
            "the weights are set back to the same values between steps: nothing is kept",
            change,
        )
    if not replaced:
        return None
    step, where, share = replaced[0]
    often = len(replaced) > 1
    if not often and share < ONCE:
        return None
    return Alarm(
        "weights_overwritten",
        step,
        f"something else than this optimizer changed the weights by {share:.0%} of their size "
        f"between two steps{f', {len(replaced)} times' if often else ''}",
        change,
        (where,),
        "warning" if often else "info",
    )


def repeated(loop: Loop) -> Alarm | None:
    """Detect the same batch in every step."""
    streak, handed = loop.history.streak("repeated"), loop.history.streak("handed")
    if not loop.lasts(streak, ENOUGH + 2):
        return None
    if loop.lasts(handed, ENOUGH + 2):
        return Alarm(
            "repeated_batch",
            streak.first,
            "the model sees the same tensor in every step",
            "this is right for training on all rows at once",
            severity="info",
        )
    return Alarm(
        "repeated_batch",
        streak.first,
        "every step sees the same batch, if these are not all of your rows: the others are never "
        "learned",
        "iterate with `for x, y in loader:`; next(iter(loader)) starts again at the first batch",
    )


def collapsed_rate(loop: Loop) -> Alarm | None:
    """Detect a learning rate that collapsed long before the end."""
    last = loop.history.last
    for index, low in enumerate(loop.history.low):
        if last is None or not low.count or loop.steps < MANY:
            continue
        if loop.steps - low.first < max(0.2 * loop.steps, MANY / 2):
            continue
        if loop.learned:
            continue
        if not any(loop.history.largest):
            return Alarm(
                "learning_rate_collapsed",
                low.first,
                "the learning rate is 0: the weights stand still",
                "give the optimizer a learning rate above 0, and look at what the schedule "
                "multiplies it by (k // n is 0 until k reaches n)",
            )
        if loop.history.largest[index]:
            return Alarm(
                "learning_rate_collapsed",
                low.first,
                f"the learning rate of group {index} fell from {loop.history.largest[index]:.2g} "
                f"to {last.rates[index]:.2g} and stays there: the weights stand still",
                "call scheduler.step() once an epoch, outside the loop over batches, or give the "
                "schedule its length in steps",
            )
    return None


def only_rising(loop: Loop) -> Alarm | None:
    """Detect a warm-up that lasts to the end."""
    history, last = loop.history, loop.history.last
    if last is None or not loop.ended or history.samples < MANY / 2 or loop.steps < 5 * MANY:
        return None
    for index, rising in enumerate(history.rising):
        if rising.count < history.samples - 1 or not last.rates[index]:
            continue
        return Alarm(
            "warmup_never_ends",
            rising.first,
            f"the learning rate of group {index} rises from the first step to the last, "
            f"{last.rates[index]:.2g}",
            "look at the order of the schedule's arguments: steps of the warm-up, then all steps",
        )
    return None


def _lasting(loop: Loop, streaks: Mapping[str, Streak]) -> list[str]:
    return [name for name, streak in streaks.items() if loop.lasts(streak, ENOUGH + 2)]


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# the first violated one explains the others
ROOTS: tuple[Law, ...] = (
    never_called,
    step_never_called,
    other_model,
    no_gradient,
    beside_the_model,
)
OTHERS: tuple[Law, ...] = (
    steps_ended,
    stepped_again,
    crushed,
    scaled,
    lost,
    clipped_late,
    thawed,
    frozen_in_name,
    not_cleared,
    mixed,
    late_backward,
    doubled,
    left_out,
    unreached,
    unmoved,
    overwritten,
    eval_mode,
    repeated,
    collapsed_rate,
    only_rising,
    apart,
    graphs_kept,
)
