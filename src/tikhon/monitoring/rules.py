"""Rules of a training step that a loop violates, each with the line to change.

Pure functions of plain values. A rule needs `MIN_SAMPLES` successive sampled steps, or two once
the loop has ended.
"""

from __future__ import annotations

from collections.abc import Mapping

from tikhon.languages import sentence
from tikhon.monitoring import sign_rules
from tikhon.monitoring.alarms import MIN_SAMPLES, Alarm, LoopState, Rule
from tikhon.monitoring.history import REPLACED_ONCE, Streak

NEGLIGIBLE_GRADIENT = 1e-5  # of the largest gradient: rounding errors of a zero gradient
MAX_GRAPHS = 10  # sampled steps whose graphs are alive
MIN_STEPS = 20  # steps, or forward passes, without a required event


def alarms(loop: LoopState) -> list[Alarm]:
    """Return the violated rules, causes before consequences; at most one alarm per rule."""
    causes = [alarm for rule in ROOT_RULES if (alarm := rule(loop)) is not None]
    others = [alarm for rule in OTHER_RULES if (alarm := rule(loop)) is not None]
    return [*causes[:1], *others]


def step_never_called(loop: LoopState) -> Alarm | None:
    """Detect forward passes without an optimizer step."""
    if loop.steps or loop.forwards < (1 if loop.ended else 5 * MIN_STEPS):
        return None
    addition = "" if loop.backwards else " and no backward pass reached the model"
    return Alarm(
        "step_never_called",
        0,
        sentence("told_forwards", count=loop.forwards)
        + f", but this optimizer never made a step{addition}: the weights stay as they are",
        "call optimizer.step() of the optimizer that is watched, after loss.backward(), "
        "and build it once, before the loop",
    )


def steps_stopped(loop: LoopState) -> Alarm | None:
    """Detect optimizer steps that cease while passes go on."""
    if not loop.steps or loop.passes_without_step < max(3 * MIN_STEPS, 5 * loop.max_passes):
        return None
    return Alarm(
        "step_never_called",
        loop.steps,
        f"{loop.passes_without_step} backward passes since this optimizer made its last step: the "
        "weights stay as they are, or another optimizer moves them",
        "build the optimizer once, before the loop, and step the one that is watched",
    )


def stepped_twice(loop: LoopState) -> Alarm | None:
    """Detect several steps along the same gradient."""
    if loop.repeated_steps < MIN_SAMPLES + 2 or loop.repeated_steps < 0.3 * loop.steps:
        return None
    return Alarm(
        "stepped_twice",
        0,
        f"{loop.repeated_steps} of {loop.steps} steps follow the gradient of the step before, "
        "without a pass in between: the learning rate is in truth a multiple of what is set",
        "call optimizer.step() once after each backward pass; scaler.step(optimizer) calls it",
    )


def frozen_but_moving(loop: LoopState) -> Alarm | None:
    """Detect frozen tensors that still move."""
    names = _lasting_names(loop, loop.history.frozen_but_moving)
    if not names:
        return None
    return Alarm(
        "frozen_but_moving",
        min(loop.history.frozen_but_moving[n].first for n in names),
        "they do not require a gradient any more, but have an old one, which the optimizer "
        "follows on, with its momentum and decay",
        "set their .grad to None when they are frozen, and take them out of the optimizer",
        tuple(names),
    )


def frozen_by_attribute(loop: LoopState) -> Alarm | None:
    """Detect modules with an attribute `requires_grad`, which torch ignores."""
    last = loop.history.last
    if last is None or not last.frozen_by_attribute:
        return None
    return Alarm(
        "frozen_in_name",
        loop.history.first_step,
        "requires_grad = False was set on the module, which changes nothing: its tensors require "
        "gradients and move",
        "call module.requires_grad_(False), which freezes its parameters",
        last.frozen_by_attribute,
    )


def graphs_kept(loop: LoopState) -> Alarm | None:
    """Detect losses or outputs that are kept with their graphs."""
    last = loop.history.last
    if last is None or last.live_graphs < MAX_GRAPHS:
        return None
    return Alarm(
        "graphs_kept",
        0,
        f"the graphs of {last.live_graphs} earlier sampled steps are still in memory: something "
        "keeps their losses or outputs",
        "add up loss.item(), and keep outputs as .detach()",
        severity="info",
    )


def nothing_happened(loop: LoopState) -> Alarm | None:
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


def no_gradient(loop: LoopState) -> Alarm | None:
    """Detect steps without a gradient, and infer the reason from the order of the passes."""
    history, last = loop.history, loop.history.last
    if loop.steps_without_gradient >= (2 if loop.ended else MIN_STEPS):
        observation = (
            f"{loop.steps_without_gradient} steps, no parameter of this optimizer had a gradient"
        )
        step = max(0, loop.steps - loop.steps_without_gradient)
    elif loop.is_lasting(history.streak("zero_gradient")):
        step = history.streak("zero_gradient").first
        observation = "every gradient of this optimizer is exactly zero"
    else:
        return None
    if last is None or not last.listening:
        why, change = "no step changes a weight", "check that loss.backward() runs before the step"
    elif last.reached.get("optimizer") and last.unfinished:
        why = "the step comes before the backward pass"
        change = "call loss.backward() before optimizer.step()"
    elif last.reached.get("optimizer") and last.gradient_arrived:
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
    return Alarm("no_gradient", step, f"{observation}: {why}", change)


def duplicated_parameters(loop: LoopState) -> Alarm | None:
    """Detect a tensor that is in the optimizer twice."""
    last = loop.history.last
    if last is None or not last.duplicates:
        return None
    return Alarm(
        "duplicated_parameters",
        last.step,
        "they stand twice in the optimizer and move twice",
        "give each parameter to the optimizer once",
        last.duplicates,
    )


def missing_from_optimizer(loop: LoopState) -> Alarm | None:
    """Detect trainable tensors with a gradient that are in no optimizer."""
    last = loop.history.last
    if last is None or loop.is_lasting(loop.history.streak("foreign_optimizer"), 1):
        return None
    names = _lasting_names(loop, loop.history.left_out)
    if not names:
        return None
    step = min(loop.history.left_out[n].first for n in names)
    unfrozen = [n for n in names if n in loop.frozen]
    meaning = "they get gradients, but are not in the optimizer and never move"
    if unfrozen:
        meaning = "they were unfrozen after the optimizer was built, which does not have them"
    return Alarm(
        "missing_from_optimizer",
        step,
        meaning,
        'add them with optimizer.add_param_group({"params": ...}), or freeze them with '
        "requires_grad_(False) if they are to stay",
        tuple(unfrozen or names),
    )


def parameters_without_gradient(loop: LoopState) -> Alarm | None:
    """Detect tensors of the optimizer that never get a gradient."""
    history, last = loop.history, loop.history.last
    if last is None or loop.is_lasting(history.streak("zero_gradient")):
        return None
    without_gradient = {
        n: last.tensors[n]
        for n in _lasting_names(loop, history.without_gradient)
        if n in last.tensors
    }
    foreign = [n for n, t in without_gradient.items() if t.foreign]
    if foreign and missing_from_optimizer(loop) is None:
        return Alarm(
            "optimizer_of_another_model",
            min(history.without_gradient[n].first for n in foreign),
            "they are in the optimizer, but not in the model, and never get a gradient",
            "build the optimizer after the last line that changes the model's layers",
            tuple(foreign),
        )
    own_tensors = {n: t for n, t in without_gradient.items() if not t.foreign}
    if not own_tensors:
        return None
    # the last bias cancels in differences of outputs, with gradient zero
    is_harmless = all(t.is_vector and t.gradient is not None for t in own_tensors.values())
    return Alarm(
        "unmoved_parameters",
        min(history.without_gradient[n].first for n in own_tensors),
        "they never get a gradient, so they keep their first values: the loss does not reach "
        "them, or they are behind a detach, dead units or a branch that is not used",
        "let the loss depend on them, or take them out of the model",
        tuple(own_tensors),
        "info" if is_harmless else "warning",
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
    moves = "most of their entries do not" if is_16_bit else "never"
    cause = (
        f"a step is below the resolution of {dtype}" if is_16_bit else "the step rounds to nothing"
    )
    change = (
        "keep the weights in float32 and use torch.autocast"
        if is_16_bit
        else ("raise the learning rate of their group")
    )
    return Alarm(
        "unmoved_parameters",
        min(history.unmoved[n].first for n in names),
        f"they get a gradient and {moves} move: {cause}",
        change,
        tuple(names),
        "info" if is_harmless else "warning",
    )


def weights_overwritten(loop: LoopState) -> Alarm | None:
    """Detect weights that are overwritten between steps."""
    if loop.is_federated:
        return None
    reset, replaced = loop.history.streak("reset_weights"), loop.history.replaced
    change = "load, initialise or copy weights before the loop, not inside it"
    since = reset.first if loop.is_lasting(reset) else loop.history.reset_since
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
    frequent = len(replaced) > 1
    if not frequent and share < REPLACED_ONCE:
        return None
    return Alarm(
        "weights_overwritten",
        step,
        f"something else than this optimizer changed the weights by {share:.0%} of their size "
        f"between two steps{f', {len(replaced)} times' if frequent else ''}",
        change,
        (where,),
        "warning" if frequent else "info",
    )


def repeated_batch(loop: LoopState) -> Alarm | None:
    """Detect the same batch in every step."""
    streak, same_tensor = loop.history.streak("repeated_batch"), loop.history.streak("same_tensor")
    if not loop.is_lasting(streak, MIN_SAMPLES + 2):
        return None
    if loop.is_lasting(same_tensor, MIN_SAMPLES + 2):
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


def learning_rate_collapsed(loop: LoopState) -> Alarm | None:
    """Detect a learning rate that collapsed long before the end."""
    last = loop.history.last
    for index, collapsed in enumerate(loop.history.collapsed_rates):
        if last is None or not collapsed.count or loop.steps < MIN_STEPS or loop.has_improved:
            continue
        if loop.steps - collapsed.first < max(0.2 * loop.steps, MIN_STEPS / 2):
            continue
        largest = loop.history.largest_rates[index]
        if not any(loop.history.largest_rates):
            return Alarm(
                "learning_rate_collapsed",
                collapsed.first,
                "the learning rate is 0: the weights stand still",
                "give the optimizer a learning rate above 0, and look at what the schedule "
                "multiplies it by (k // n is 0 until k reaches n)",
            )
        if largest:
            return Alarm(
                "learning_rate_collapsed",
                collapsed.first,
                f"the learning rate of group {index} fell from {largest:.2g} "
                f"to {last.learning_rates[index]:.2g} and stays there: the weights stand still",
                "call scheduler.step() once an epoch, outside the loop over batches, or give the "
                "schedule its length in steps",
            )
    return None


def warmup_never_ends(loop: LoopState) -> Alarm | None:
    """Detect a warm-up that lasts to the end."""
    history, last = loop.history, loop.history.last
    if (
        last is None
        or not loop.ended
        or history.samples < MIN_STEPS / 2
        or loop.steps < 5 * MIN_STEPS
    ):
        return None
    for index, rising in enumerate(history.rising_rates):
        if rising.count < history.samples - 1 or not last.learning_rates[index]:
            continue
        return Alarm(
            "warmup_never_ends",
            rising.first,
            f"the learning rate of group {index} rises from the first step to the last, "
            f"{last.learning_rates[index]:.2g}",
            "look at the order of the schedule's arguments: steps of the warm-up, then all steps",
        )
    return None


def _lasting_names(loop: LoopState, streaks: Mapping[str, Streak]) -> list[str]:
    return [name for name, streak in streaks.items() if loop.is_lasting(streak, MIN_SAMPLES + 2)]


# the first violated one explains the others
ROOT_RULES: tuple[Rule, ...] = (
    nothing_happened,
    step_never_called,
    sign_rules.optimizer_of_another_model,
    no_gradient,
    sign_rules.loss_not_connected,
)
OTHER_RULES: tuple[Rule, ...] = (
    steps_stopped,
    stepped_twice,
    sign_rules.clipped_before_unscaling,
    sign_rules.step_of_scaled_gradients,
    sign_rules.micro_batches_lost,
    sign_rules.clipped_after_step,
    sign_rules.clipped_before_backward,
    sign_rules.loss_upside_down,
    sign_rules.broadcast_loss,
    sign_rules.head_mismatch,
    sign_rules.missing_log,
    sign_rules.target_out_of_range,
    frozen_but_moving,
    frozen_by_attribute,
    sign_rules.gradients_not_cleared,
    sign_rules.gradients_of_another_loss,
    sign_rules.step_before_backward,
    duplicated_parameters,
    missing_from_optimizer,
    parameters_without_gradient,
    unmoved_parameters,
    weights_overwritten,
    sign_rules.eval_mode_in_training,
    repeated_batch,
    learning_rate_collapsed,
    warmup_never_ends,
    sign_rules.replicas_differ,
    graphs_kept,
)
