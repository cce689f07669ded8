"""Rules that a loop violates while a sign lasts over its sampled steps."""

from __future__ import annotations

from tikhon.monitoring.alarms import MIN_SAMPLES, Alarm, LoopState, Rule


def _rule_of_sign(
    sign: str,
    code: str,
    meaning: str,
    change: str,
    *,
    may_recur: bool = False,
    min_samples: int = MIN_SAMPLES,
) -> Rule:
    """Return a rule that is violated while a sign lasts, or also if it recurs (`may_recur`).

    The meaning may format figures of the `last` sampled step.
    """

    def rule(loop: LoopState) -> Alarm | None:
        streak = loop.history.streak(sign)
        frequent = loop.history.frequent(sign) if may_recur else None
        if frequent is None and not loop.is_lasting(streak, min_samples):
            return None
        description = meaning.format(last=loop.history.last)
        return Alarm(code, (frequent or streak).first, description, change)

    return rule


loss_not_connected = _rule_of_sign(
    "unconnected",
    "loss_not_connected",
    "the weights have gradients, but none comes through an output of a layer: only a penalty on "
    "the weights is trained",
    "compute the loss from model(x) itself, without .item(), .detach() or argmax",
)
clipped_after_step = _rule_of_sign(
    "clipped_after_step",
    "clipped_after_step",
    "the gradients are changed after the step that used them and before the next pass: clipping "
    "there does nothing",
    "call clip_grad_norm_ between loss.backward() and optimizer.step()",
)
gradients_not_cleared = _rule_of_sign(
    "uncleared",
    "gradients_not_cleared",
    "the gradients are not cleared: each step moves along the sum of all gradients so far",
    "call optimizer.zero_grad() once a step, before loss.backward()",
    may_recur=True,
)
gradients_of_another_loss = _rule_of_sign(
    "mixed_losses",
    "gradients_of_another_loss",
    "the gradient that a pass for another optimizer left before that one's step is not cleared: "
    "this step moves along both losses",
    "call optimizer.zero_grad() of this optimizer right before its own backward pass, or "
    ".detach() what the other loss takes from this model",
    may_recur=True,
)
step_before_backward = _rule_of_sign(
    "step_before_backward",
    "step_before_backward",
    "the step comes before the backward pass of its batch: it moves along the gradient of the "
    "batch before",
    "call loss.backward() before optimizer.step()",
)
eval_mode_in_training = _rule_of_sign(
    "eval_mode",
    "eval_mode_in_training",
    "the model trains in eval mode: dropout is off and BatchNorm keeps its old statistics",
    "call model.train() before the training batches, after every evaluation",
)
clipped_before_unscaling = _rule_of_sign(
    "clipped_while_scaled",
    "clipped_before_unscaling",
    "the gradients are clipped while they are scaled by {last.scale:.0f}: what the step follows "
    "has a norm of {last.size:.0e}",
    "call scaler.unscale_(optimizer) before clipping",
)
step_of_scaled_gradients = _rule_of_sign(
    "scaled_gradients",
    "step_of_scaled_gradients",
    "the step follows gradients that are still scaled by {last.scale:.0f}",
    "call scaler.step(optimizer) in place of optimizer.step()",
)
micro_batches_lost = _rule_of_sign(
    "cleared_micro_batches",
    "micro_batches_lost",
    "a step follows {last.backwards} backward passes, but the gradients are cleared between them: "
    "only the last micro-batch counts",
    "call optimizer.zero_grad() once a step, where optimizer.step() is called",
)
optimizer_of_another_model = _rule_of_sign(
    "foreign_optimizer",
    "optimizer_of_another_model",
    "none of the {last.optimizer_count} tensors of the optimizer is a parameter of this model, "
    "which does not move: it was built for another, perhaps an older, model",
    "build the optimizer from model.parameters() after the last line that makes, wraps or moves "
    "the model",
)
replicas_differ = _rule_of_sign(
    "replicas_differ",
    "replicas_differ",
    "the weights of the processes differ by {last.replica_distance:.0e} of their size: each "
    "trains a model of its own",
    "call the DistributedDataParallel module, not its .module, and change weights on every "
    "process alike",
    min_samples=2,
)
clipped_before_backward = _rule_of_sign(
    "clipped_before_backward",
    "clipped_before_backward",
    "clip_grad_norm_ is called before the backward pass, where the gradients are cleared: the "
    "step follows gradients that are not clipped",
    "call clip_grad_norm_ between loss.backward() and optimizer.step()",
)
loss_upside_down = _rule_of_sign(
    "loss_upside_down",
    "loss_upside_down",
    "the steps go up the loss: its sign is turned round, or the optimizer has maximize=True",
    "give the optimizer maximize=False, and the loss without a minus sign",
)
broadcast_loss = _rule_of_sign(
    "broadcast_loss",
    "broadcast_loss",
    "outputs of shape {last.loss_shapes[0]} and targets are broadcast to {last.loss_shapes[1]}: "
    "the output of every row is compared with the targets of all rows",
    "give both one shape, as with target.view_as(output)",
)
head_mismatch = _rule_of_sign(
    "head_mismatch",
    "head_mismatch",
    "the loss applies a softmax or a sigmoid to outputs that already went through one: gradients "
    "stay small and the loss cannot reach 0",
    "return the scores of the last layer, without softmax or sigmoid",
)
missing_log = _rule_of_sign(
    "missing_log",
    "missing_log",
    "nll_loss gets numbers above 0, which are no logarithms of probabilities: it falls without "
    "end",
    "use cross_entropy on the scores of the last layer, or log_softmax before nll_loss",
)
target_out_of_range = _rule_of_sign(
    "target_out_of_range",
    "target_out_of_range",
    "binary_cross_entropy_with_logits gets targets below 0 or above 1: it falls without end",
    "give targets from 0 to 1",
)
