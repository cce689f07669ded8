"""Codes of findings: their texts, and which code is a consequence of which.

Standard library only. A code has its name, its effect and its cures in `tikhon.languages`
(`finding_`, `effect_`, `cures_CODE`, in every language), and a section in `docs/diagnosis.md`.
A reason `why_REASON` may have an effect and cures of its own (`effect_`, `cures_REASON`).
"""

from __future__ import annotations

from typing import Literal

from tikhon.languages import Sentence, sentence, strings

CODES = tuple(
    code
    for key in strings("en")
    if (code := key.removeprefix("effect_")) != key and f"finding_{code}" in strings("en")
)


def treatment_sentence(family: Literal["effect", "cures"], code: str, why: str) -> Sentence:
    """Return the effect or cures of a reason, else of the reason nested in it, else of the code.

    >>> why = sentence("why_rate_zero", why=sentence("why_unmoved"))
    >>> treatment_sentence("cures", "slow_convergence", why)
    'a learning rate above 0'
    """
    reason: object = why
    while isinstance(reason, Sentence):
        key = reason.key.replace("why", family, 1)
        if key in strings("en"):
            return sentence(key)
        reason = reason.values.get("why")
    return sentence(f"{family}_{code}")


# treatments that do not help
NO_CURE = {
    "loss_not_connected": "no learning rate, loss or network helps",
    "broadcast_loss": "a longer run, another learning rate or a larger network do not help",
    "loss_ignores_targets": "no network, learning rate or number of steps helps",
    "rows_mixed": "more data or steps do not separate rows that are mixed",
    "masks_not_transformed": "no network or learning rate finds what is somewhere else",
    "undefined_operation": "a smaller learning rate only postpones it",
    "no_nonlinearity": "more or wider linear layers do not help",
    "posterior_collapse": "a longer run or a larger code does not help",
    "embedding_collapse": "a longer run does not separate what is one point",
    "constant_targets": "no network or learning rate finds classes that the targets do not have",
    "inputs_ignored": "no learning rate or number of steps helps",
    "loss_upside_down": "a smaller learning rate only makes it worse more slowly",
    "padding_in_loss": "a loss that is low because padding is easy says nothing",
    "unrelated_labels": "no learning rate, network or number of steps helps",
    "data_changed_in_place": "no network or learning rate keeps up with data that change",
    "angle_wraps": "no network answers a jump that the inputs do not have",
    "vanishing_gradient": "L1, L2, dropout and clipping do not raise the gain",
    "exploding_gradient": "dropout does not lower the gain",
    "dying_relu": "more steps do not revive a dead unit",
    "saturated_activation": "clipping does not move a unit off its flat end",
    "poor_init": "a smaller learning rate only makes it slower",
    "slow_convergence": "a larger batch makes a step no longer",
    "underfitting": "more data does not help",
}

# consequence -> causes that it is listed under
_DISCONNECTED = "loss_not_connected unregistered_parameters layers_made_in_forward detached"
_HOPELESS = (
    f"{_DISCONNECTED} "
    "loss_ignores_targets posterior_collapse embedding_collapse dropout_at_end loss_upside_down "
    "inputs_ignored "
    "shared_layers target_among_inputs constant_targets padding_seen padding_in_loss "
    "constant_inputs broadcast_loss rows_mixed positions_mixed target_out_of_range missing_log "
    "updates_lost data_changed_in_place unrelated_labels no_nonlinearity no_positions "
    "multilabel_softmax classes_as_numbers ignored_rows class_imbalance sorted_batches "
    "train_eval_mismatch batchnorm_few_rows frozen_parameters missing_from_optimizer"
)
_CAUSES = {
    "no_nonlinearity": "head_mismatch",
    "embedding_collapse": (
        "constant_targets constant_inputs inputs_ignored loss_upside_down target_among_inputs "
        "target_out_of_range"
    ),
    "inputs_ignored": "unscaled_inputs",  # saturated gates give the same output for all rows
    "unused_parameters": _DISCONNECTED,
    "nothing_to_train": _DISCONNECTED,
    "future_visible": "positions_mixed rows_mixed",
    # a network that cannot learn is no evidence about its targets
    "unrelated_labels": (
        f"{_DISCONNECTED} loss_ignores_targets broadcast_loss rows_mixed positions_mixed "
        "no_nonlinearity frozen_parameters"
    ),
    # a network that cannot learn predicts the majority class
    "class_imbalance": (
        _HOPELESS.replace(" class_imbalance", "") + " head_mismatch saturated_activation"
    ),
    "frozen_parameters": "poor_init",  # the trained part has no gradient either
    "overfitting": "unrelated_labels valid_differs",
    "train_eval_mismatch": "rows_mixed batchnorm_few_rows random_in_eval",
    "exploding_gradient": (
        "loss_is_a_sum loss_upside_down undefined_operation target_out_of_range missing_log "
        "unscaled_inputs unscaled_targets poor_init"
    ),
    "vanishing_gradient": (
        f"{_DISCONNECTED} constant_inputs inputs_ignored poor_init head_mismatch dying_relu "
        "saturated_activation"
    ),
    "poor_init": "inputs_ignored loss_not_connected",
    "random_in_eval": "layers_made_in_forward",
    "loss_upside_down": "target_out_of_range missing_log target_not_detached",
    "dying_relu": (
        "loss_is_a_sum constant_inputs inputs_ignored undefined_operation exploding_gradient "
        "poor_init head_mismatch unscaled_inputs"
    ),
    "saturated_activation": (
        "loss_is_a_sum loss_upside_down target_out_of_range missing_log head_mismatch poor_init "
        "unscaled_inputs"
    ),
    "oscillating_loss": (
        f"{_HOPELESS} loss_is_a_sum saturated_activation unscaled_inputs exploding_gradient"
    ),
    "slow_convergence": (
        f"{_HOPELESS} head_mismatch vanishing_gradient dying_relu saturated_activation poor_init "
        "unscaled_inputs"
    ),
    "underfitting": (
        f"{_HOPELESS} excessive_dropout vanishing_gradient dying_relu saturated_activation "
        "poor_init oscillating_loss head_mismatch"
    ),
}
CONSEQUENCES = {code: tuple(causes.split()) for code, causes in _CAUSES.items()}
