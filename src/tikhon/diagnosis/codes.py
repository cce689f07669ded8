"""What each code means, in words: effect, cures in the order to try, what does not help.

Standard library only. `docs/diagnosis.md` has a section for every code listed here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """The wording of a finding."""

    effect: str
    cures: tuple[str, ...]
    no_cure: str = ""


CODES: dict[str, Code] = {
    "vanishing_gradient": Code(
        "the first layers receive no signal and stay what chance made them",
        ("residual connections with a norm", "weights of the right gain", "normalisation layers"),
        "L1, L2, dropout and clipping do not raise the gain",
    ),
    "exploding_gradient": Code(
        "steps overshoot until numbers overflow",
        ("a smaller learning rate", "weights of the right gain", "clipping", "normalisation"),
        "dropout does not lower the gain",
    ),
    "dying_relu": Code(
        "dead units get no gradient: they stay dead",
        ("a smaller learning rate", "fresh weights and zero biases", "leaky activations"),
        "more steps do not revive a dead unit",
    ),
    "saturated_activation": Code(
        "flat ends pass no gradient back",
        ("inputs scaled to mean 0, deviation 1", "smaller weights", "a smaller learning rate"),
        "clipping does not move a unit off its flat end",
    ),
    "poor_init": Code(
        "training starts where no optimizer gets far",
        ("weights of the right gain (He, Xavier, orthogonal)", "LSUV", "normalisation layers"),
        "a smaller learning rate only makes it slower",
    ),
    "oscillating_loss": Code(
        "the run jumps around a minimum it cannot enter",
        ("a smaller learning rate", "larger batches", "a decaying schedule"),
    ),
    "slow_convergence": Code(
        "the budget ends before learning starts",
        ("a larger learning rate", "Adam", "inputs scaled to deviation 1", "a matching head"),
        "a larger batch makes a step no longer",
    ),
    "overfitting": Code(
        "the network memorises rows instead of learning what they share",
        ("early stopping", "weight decay", "dropout", "a smaller network", "more data"),
    ),
    "underfitting": Code(
        "even the training rows are not explained",
        ("less penalty or dropout", "a wider network", "a larger learning rate"),
        "more data does not help",
    ),
    "head_mismatch": Code(
        "the loss has a floor that no training removes",
        ("remove the last activation, or use the loss that belongs to it",),
    ),
    "unscaled_inputs": Code(
        "the first layer works far from where its initialisation is meant for",
        ("scale inputs to mean 0, deviation 1", "a normalisation layer first"),
    ),
    "unscaled_targets": Code(
        "the first gradients are as large as the targets",
        ("scale targets to mean 0, deviation 1",),
    ),
    "loss_is_a_sum": Code(
        "the best learning rate changes with the batch size",
        ("reduction='mean'",),
    ),
    "excessive_dropout": Code("almost nothing passes", ("a rate of 0.5 or less",)),
    "dropout_before_norm": Code("train and test disagree", ("dropout after the norm",)),
    "batchnorm_batch_of_one": Code("outputs do not depend on inputs", ("LayerNorm", "batches")),
    "nothing_to_train": Code("no step changes anything", ("requires_grad_(True)",)),
    "frozen_parameters": Code("they keep their values", ()),
    "unused_parameters": Code("they never learn", ("use them in forward, or remove them",)),
    "missing_from_optimizer": Code("they never learn", ("pass model.parameters()",)),
    "changes_in_forward": Code(
        "a forward pass has side effects", ("create and change parameters outside forward",)
    ),
    "train_eval_mismatch": Code(
        "the model that is used is not the one that was trained",
        ("larger batches", "GroupNorm or LayerNorm", "check model.eval()"),
    ),
    "collapsed_attention": Code(
        "gradients pass through one position only", ("smaller query and key weights", "QK norm")
    ),
    "unstable_loss_scale": Code(
        "steps are skipped, or small gradients are lost in half precision",
        ("bfloat16 instead of float16", "a smaller learning rate", "a norm before the head"),
    ),
    "non_finite_data": Code("one NaN makes every weight NaN", ("drop or fill the rows",)),
}

# consequence -> causes under which it is printed
CONSEQUENCES: dict[str, tuple[str, ...]] = {
    "exploding_gradient": ("unscaled_inputs", "unscaled_targets", "poor_init"),
    "vanishing_gradient": ("poor_init", "head_mismatch", "dying_relu", "saturated_activation"),
    "dying_relu": ("exploding_gradient", "poor_init", "head_mismatch", "unscaled_inputs"),
    "saturated_activation": ("poor_init", "unscaled_inputs"),
    "oscillating_loss": ("saturated_activation", "unscaled_inputs", "exploding_gradient"),
    "slow_convergence": (
        "head_mismatch", "vanishing_gradient", "dying_relu", "saturated_activation", "poor_init",
        "unscaled_inputs",
    ),
    "underfitting": (
        "excessive_dropout", "vanishing_gradient", "dying_relu", "saturated_activation",
        "poor_init", "oscillating_loss", "head_mismatch",
    ),
    "excessive_dropout": (),
}  # fmt: skip
