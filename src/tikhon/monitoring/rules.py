"""Rules of a training step that a loop violates.

Pure functions of plain values. A rule needs `MIN_SAMPLES` successive sampled steps, or two once
the loop has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean, median, stdev

from tikhon.languages import sentence
from tikhon.monitoring.alarms import MIN_SAMPLES, Alarm, LoopState, alarm
from tikhon.monitoring.history import LOSS_FAULTS, REPLACED_ONCE, Streak

NEGLIGIBLE_GRADIENT = 1e-5  # of the largest gradient: rounding errors of a zero gradient
MAX_GRAPHS = 10  # sampled steps whose graphs are alive
DRIFT = 10.0  # factor between the spreads of batches, where their tensor is written to
UNTOLD = 0.05  # part of the loss that the order of learned targets saves at least (convention)
MIN_EPOCHS, MIN_GAINS = 3, 8  # epochs of a loader, and readings, after which that is judged
MIN_PATH = 0.1  # path of the weights / their size: a rate that could have learned it
STRONG_DECAY = 0.05  # of the weights in a step: after 14 steps half is gone (convention)
MIN_STEPS = 20  # steps, or forward passes, without a required event
# of signs that are named otherwise
CODES = {"negative_weight": "loss_upside_down", "slope_without_graph": "loss_not_connected"}
RECURRING = {"gradients_not_cleared", "gradients_of_another_loss"}  # may hold now and then
# figures of the last sampled step in the sentences of a sign
FIGURES: Mapping[str, tuple[str, ...]] = {
    "clipped_before_unscaling": ("scale", "size"),
    "step_of_scaled_gradients": ("scale",),
    "micro_batches_lost": ("backwards",),
    "optimizer_of_another_model": ("optimizer_count",),
    "replicas_differ": ("replica_distance",),
    "broadcast_loss": ("output_shape", "broadcast_shape"),
    "batches_unused": ("forwards", "backwards"),
}

Rule = Callable[[LoopState], Alarm | None]


def alarms(loop: LoopState) -> list[Alarm]:
    """Return the violated rules, causes before consequences; at most one alarm per rule."""
    causes = [found for rule in ROOT_RULES if (found := _apply(rule, loop)) is not None]
    others = [found for rule in OTHER_RULES if (found := _apply(rule, loop)) is not None]
    return [*causes[:1], *others]


def _apply(rule: Rule | str, loop: LoopState) -> Alarm | None:
    return _violated_sign(loop, rule) if isinstance(rule, str) else rule(loop)


def _violated_sign(loop: LoopState, sign: str) -> Alarm | None:
    """Detect a sign that lasts over sampled steps, or recurs where it may."""
    streak = loop.history.streak(sign)
    frequent = loop.history.frequent(sign) if sign in RECURRING else None
    min_samples = 2 if sign == "replicas_differ" else MIN_SAMPLES
    if frequent is None and not loop.is_lasting(streak, min_samples):
        return None
    last = loop.history.last
    source = last.losses if last is not None and sign in LOSS_FAULTS else last
    values = {name: getattr(source, name) for name in FIGURES.get(sign, ())}
    return alarm(CODES.get(sign, sign), (frequent or streak).first, key=sign, **values)


def step_never_called(loop: LoopState) -> Alarm | None:
    """Detect forward passes without an optimizer step."""
    if loop.steps or loop.forwards < (1 if loop.ended else 5 * MIN_STEPS):
        return None
    key = "step_never_called" if loop.backwards else "backward_never_called"
    passes = sentence("told_forwards", count=loop.forwards)
    return alarm("step_never_called", key=key, passes=passes)


def steps_stopped(loop: LoopState) -> Alarm | None:
    """Detect optimizer steps that cease while passes go on."""
    count = loop.passes_without_step
    if not loop.steps or count < max(3 * MIN_STEPS, 5 * loop.max_passes):
        return None
    return alarm("step_never_called", loop.steps, key="steps_stopped", count=count)


def stepped_twice(loop: LoopState) -> Alarm | None:
    """Detect several steps along the same gradient."""
    count = loop.repeated_steps
    if count < MIN_SAMPLES + 2 or count < 0.3 * loop.steps:
        return None
    return alarm("stepped_twice", count=count, steps=loop.steps)


def frozen_but_moving(loop: LoopState) -> Alarm | None:
    """Detect frozen tensors that still move."""
    streaks = loop.history.frozen_but_moving
    names = _lasting_names(loop, streaks)
    return alarm("frozen_but_moving", _first(streaks, names), where=names) if names else None


def frozen_by_attribute(loop: LoopState) -> Alarm | None:
    """Detect modules with an attribute `requires_grad`, which torch ignores."""
    last = loop.history.last
    if last is None or not last.frozen_by_attribute:
        return None
    return alarm("frozen_in_name", loop.history.first_step, where=last.frozen_by_attribute)


def graphs_kept(loop: LoopState) -> Alarm | None:
    """Detect losses or outputs that are kept with their graphs."""
    last = loop.history.last
    if last is None or last.live_graphs < MAX_GRAPHS:
        return None
    return alarm("graphs_kept", severity="info", count=last.live_graphs)


def nothing_happened(loop: LoopState) -> Alarm | None:
    """Detect a loop without passes or steps."""
    is_idle = loop.ended and not loop.steps and not loop.forwards
    return alarm("nothing_happened", severity="info") if is_idle else None


def no_gradient(loop: LoopState) -> Alarm | None:
    """Detect steps without a gradient, and infer the reason from the order of the passes."""
    history, last, missing = loop.history, loop.history.last, loop.steps_without_gradient
    if missing >= (2 if loop.ended else MIN_STEPS):
        observation, step = sentence("told_no_gradient", count=missing), loop.steps - missing
    elif loop.is_lasting(history.streak("zero_gradient")):
        step = history.streak("zero_gradient").first
        observation = sentence("told_zero_gradient")
    else:
        return None
    key = "no_gradient_unseen"
    if last is not None and last.listening:
        key = "no_gradient_unconnected"
        if last.reached.get("optimizer"):
            is_lost = last.gradient_arrived
            key = "no_gradient_cleared" if is_lost else "no_gradient_constant"
            key = "no_gradient_early_step" if last.unfinished else key
        elif last.reached.get("model"):
            key = "no_gradient_elsewhere"
    return alarm("no_gradient", max(0, step), key=key, observation=observation)


def duplicated_parameters(loop: LoopState) -> Alarm | None:
    """Detect a tensor that is in the optimizer twice."""
    last = loop.history.last
    if last is None or not last.duplicates:
        return None
    return alarm("duplicated_parameters", last.step, where=last.duplicates)


def missing_from_optimizer(loop: LoopState) -> Alarm | None:
    """Detect trainable tensors with a gradient that are in no optimizer."""
    streaks = loop.history.left_out
    names = _lasting_names(loop, streaks)
    is_foreign = loop.is_lasting(loop.history.streak("optimizer_of_another_model"), 1)
    if not names or is_foreign:
        return None
    unfrozen = [n for n in names if n in loop.frozen]
    code = "missing_from_optimizer"
    key = "unfrozen_too_late" if unfrozen else code
    return alarm(code, _first(streaks, names), key=key, where=unfrozen or names)


def parameters_without_gradient(loop: LoopState) -> Alarm | None:
    """Detect tensors of the optimizer that never get a gradient."""
    history, last = loop.history, loop.history.last
    if last is None or loop.is_lasting(history.streak("zero_gradient")):
        return None
    streaks = history.without_gradient
    silent = {n: last.tensors[n] for n in _lasting_names(loop, streaks) if n in last.tensors}
    foreign = [n for n, t in silent.items() if t.foreign]
    if foreign and missing_from_optimizer(loop) is None:
        code, key = "optimizer_of_another_model", "tensors_of_another_model"
        return alarm(code, _first(streaks, foreign), key=key, where=foreign)
    own_tensors = {n: t for n, t in silent.items() if not t.foreign}
    if not own_tensors:
        return None
    # the last bias cancels in differences of outputs, with gradient zero
    is_harmless = all(t.is_vector and t.gradient is not None for t in own_tensors.values())
    return alarm(
        "unmoved_parameters",
        _first(streaks, own_tensors),
        key="without_gradient",
        where=own_tensors,
        severity="info" if is_harmless else "warning",
    )


def unmoved_parameters(loop: LoopState) -> Alarm | None:
    """Detect tensors of the optimizer that have a gradient but never move."""
    history, last = loop.history, loop.history.last
    names = _lasting_names(loop, history.unmoved)
    if last is None or not names:
        return None
    dtype = last.tensors[names[0]].kind if names[0] in last.tensors else ""
    is_16_bit = dtype in ("bfloat16", "float16")
    if not is_16_bit and loop.is_lasting(history.streak("vanished")):
        return None  # vanishing gradients are reported otherwise
    # a bias before a norm has no effect: its gradient is zero up to rounding
    largest = max((t.gradient or 0.0 for t in last.tensors.values()), default=0.0)
    readings = [last.tensors[n] for n in names if n in last.tensors]
    is_harmless = not is_16_bit and all(
        t.is_vector and (t.gradient or 0) < NEGLIGIBLE_GRADIENT * largest for t in readings
    )
    code, first = "unmoved_parameters", _first(history.unmoved, names)
    if is_16_bit:
        return alarm(code, first, key="below_resolution", where=names, dtype=dtype)
    return alarm(code, first, where=names, severity="info" if is_harmless else "warning")


def weights_overwritten(loop: LoopState) -> Alarm | None:
    """Detect weights that are overwritten between steps."""
    if loop.is_federated:
        return None
    reset, replaced = loop.history.streak("reset_weights"), loop.history.replaced
    since = reset.first if loop.is_lasting(reset) else loop.history.reset_since
    if since is not None:
        return alarm("weights_overwritten", since, key="weights_reset")
    if not replaced:
        return None
    step, where, share = replaced[0]
    frequent = len(replaced) > 1
    if not frequent and share < REPLACED_ONCE:
        return None
    return alarm(
        "weights_overwritten",
        step,
        where=(where,),
        severity="warning" if frequent else "info",
        share=share,
        count=len(replaced),
    )


def repeated_batch(loop: LoopState) -> Alarm | None:
    """Detect the same batch in every step."""
    streak, same_tensor = loop.history.streak("repeated_batch"), loop.history.streak("same_tensor")
    if not loop.is_lasting(streak, MIN_SAMPLES + 2):
        return None
    if loop.is_lasting(same_tensor, MIN_SAMPLES + 2):
        return alarm("repeated_batch", streak.first, key="same_tensor", severity="info")
    return alarm("repeated_batch", streak.first)


def sorted_batches(loop: LoopState) -> Alarm | None:
    """Detect batches of one class each, of which there are several."""
    classes, samples = loop.history.classes, loop.history.samples
    count = classes.total()
    if count < MIN_SAMPLES + 2 or count < 0.6 * samples or len(classes) < 2:
        return None
    return alarm("sorted_batches", loop.history.first_step, count=count, samples=samples)


def data_changed_in_place(loop: LoopState) -> Alarm | None:
    """Detect rows that are changed where they lie, so that they drift from epoch to epoch."""
    history = loop.history
    if history.spreads < MIN_SAMPLES + 2 or history.spreads < 0.8 * (history.samples - 1):
        return None
    factor, first = history.largest_spread / history.least_spread, history.first_step
    return alarm("data_changed_in_place", first, factor=factor) if factor >= DRIFT else None


def unrelated_labels(loop: LoopState) -> Alarm | None:
    """Detect targets that the model cannot tell from those of other rows, after some epochs."""
    gains = list(loop.history.gains)
    late = gains[len(gains) // 2 :]
    path = loop.history.path * loop.steps / max(1, loop.history.samples)
    if loop.epochs < MIN_EPOCHS or len(late) < MIN_GAINS or path < MIN_PATH:
        return None
    gain, error = fmean(late), stdev(late) / len(late) ** 0.5
    if gain + 2 * error > UNTOLD:
        return None
    return alarm("unrelated_labels", epochs=loop.epochs, gain=max(0.0, gain))


def decay_too_strong(loop: LoopState) -> Alarm | None:
    """Detect weight decay that takes what the last steps have taught."""
    decays = loop.history.decays
    if len(decays) < 2 * MIN_SAMPLES or median(decays) < STRONG_DECAY:
        return None
    return alarm("decay_too_strong", loop.history.first_step, share=median(decays))


def learning_rate_collapsed(loop: LoopState) -> Alarm | None:
    """Detect a learning rate that collapsed long before the end."""
    last, largest_rates = loop.history.last, loop.history.largest_rates
    if last is None or loop.steps < MIN_STEPS or loop.has_improved:
        return None
    code = "learning_rate_collapsed"
    for index, collapsed in enumerate(loop.history.collapsed_rates):
        standstill = loop.steps - collapsed.first
        if not collapsed.count or standstill < max(0.2 * loop.steps, MIN_STEPS / 2):
            continue
        if not any(largest_rates):
            return alarm(code, collapsed.first, key="learning_rate_zero")
        if largest := largest_rates[index]:
            rate = last.learning_rates[index]
            return alarm(code, collapsed.first, group=index, largest=largest, rate=rate)
    return None


def warmup_never_ends(loop: LoopState) -> Alarm | None:
    """Detect a warm-up that lasts to the end."""
    history, last = loop.history, loop.history.last
    is_short = history.samples < MIN_STEPS / 2 or loop.steps < 5 * MIN_STEPS
    if last is None or not loop.ended or is_short:
        return None
    for index, rising in enumerate(history.rising_rates):
        if rising.count >= history.samples - 1 and (rate := last.learning_rates[index]):
            return alarm("warmup_never_ends", rising.first, group=index, rate=rate)
    return None


def _lasting_names(loop: LoopState, streaks: Mapping[str, Streak]) -> list[str]:
    return [name for name, streak in streaks.items() if loop.is_lasting(streak, MIN_SAMPLES + 2)]


def _first(streaks: Mapping[str, Streak], names: Iterable[str]) -> int:
    return min(streaks[name].first for name in names)


# the first violated one explains the others; a code alone is a sign that lasts
ROOT_RULES: tuple[Rule | str, ...] = (
    nothing_happened,
    step_never_called,
    "optimizer_of_another_model",
    no_gradient,
    "loss_not_connected",
)
OTHER_RULES: tuple[Rule | str, ...] = (
    steps_stopped,
    stepped_twice,
    "clipped_before_unscaling",
    "step_of_scaled_gradients",
    "micro_batches_lost",
    "batches_unused",
    "backward_twice",
    "random_numbers_repeat",
    sorted_batches,
    data_changed_in_place,
    "state_cut_off",
    "clipped_after_step",
    "clipped_before_backward",
    *LOSS_FAULTS,
    frozen_but_moving,
    frozen_by_attribute,
    "gradients_not_cleared",
    "gradients_of_another_loss",
    "step_before_backward",
    duplicated_parameters,
    missing_from_optimizer,
    parameters_without_gradient,
    unmoved_parameters,
    weights_overwritten,
    "eval_mode_in_training",
    repeated_batch,
    decay_too_strong,
    learning_rate_collapsed,
    warmup_never_ends,
    "replicas_differ",
    graphs_kept,
)
