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
    "loss_not_connected": Code(
        "no step can change anything",
        ("compute the loss from the model's output with torch functions alone",),
        "no learning rate, loss or network helps",
    ),
    "unregistered_parameters": Code(
        "these layers keep their first random weights",
        ("nn.ModuleList for layers in a list, nn.ModuleDict in a dictionary, nn.Parameter",),
    ),
    "layers_made_in_forward": Code(
        "whatever they learn is thrown away before the next batch",
        ("make the layers once, in __init__",),
    ),
    "detached": Code(
        "these layers keep their first random weights",
        ("leave the detach out", "requires_grad_(False) on what is to stay"),
    ),
    "target_not_detached": Code(
        "the goal gives way instead of being reached, and values come out wrong",
        ("no gradient through the goal; a copy of the network for it that follows slowly",),
    ),
    "broadcast_loss": Code(
        "the best answer to every row is the mean of all targets",
        ("give output and target one shape",),
        "a longer run, another learning rate or a larger network do not help",
    ),
    "loss_ignores_targets": Code(
        "nothing ties an answer to its own row",
        ("a loss of each row, and its mean over the rows",),
        "no network, learning rate or number of steps helps",
    ),
    "loss_mixes_rows": Code(
        "the loss of a row depends on its batch", ("large batches, if it is meant",)
    ),
    "rows_mixed": Code(
        "the answer to a row depends on which rows stand beside it",
        ("keep the axis of the rows out of sums, views, softmaxes and time",),
        "more data or steps do not separate rows that are mixed",
    ),
    "future_visible": Code(
        "the training loss is excellent and the network cannot predict",
        ("a causal mask", "one direction only"),
    ),
    "shifted_twice": Code(
        "the network learns to leave a token out",
        ("labels that are moved once: by the data or by the loss",),
    ),
    "masks_not_transformed": Code(
        "the targets belong to a picture that the network is not shown",
        ("one draw of the motion for the picture and its targets",),
        "no network or learning rate finds what is somewhere else",
    ),
    "positions_mixed": Code(
        "what is learned for one position lands at another",
        ("transpose or permute the axes; view only splits and joins neighbours",),
    ),
    "target_out_of_range": Code(
        "the loss falls without end and means nothing",
        ("targets in the range that the loss is made for", "the loss that fits the targets"),
    ),
    "missing_log": Code(
        "the loss falls without end or hardly at all, and means nothing",
        ("log_softmax before the loss", "cross-entropy on the scores"),
    ),
    "multilabel_softmax": Code(
        "of the classes of a row the network can name one",
        ("a sigmoid for each class: binary cross-entropy on the scores",),
    ),
    "classes_as_numbers": Code(
        "class 2 counts as between 1 and 3, which names of classes are not",
        ("one output a class and cross-entropy",),
    ),
    "ignored_rows": Code(
        "these classes are never learned",
        ("another ignore_index", "class weights above 0"),
    ),
    "undefined_operation": Code(
        "one such number makes every weight NaN",
        ("keep the argument away from the edge", "the loss on scores that torch offers"),
        "a smaller learning rate only postpones it",
    ),
    "no_nonlinearity": Code(
        "however deep, the network is one linear layer",
        ("an activation between the layers",),
        "more or wider linear layers do not help",
    ),
    "no_positions": Code(
        "the network sees a bag of tokens, not a sequence",
        ("add positional embeddings to the inputs of the attention",),
    ),
    "posterior_collapse": Code(
        "the decoder answers without its code: every row is rebuilt as the mean of all",
        (
            "sum the reconstruction over its entries, as the divergence is summed",
            "a weight of the divergence that grows from 0",
        ),
        "a longer run or a larger code does not help",
    ),
    "random_in_eval": Code(
        "predictions change from call to call",
        ("draw only while self.training is true",),
    ),
    "batchnorm_few_rows": Code(
        "noise in every pass, and running statistics that fit no batch",
        ("larger batches", "GroupNorm or LayerNorm"),
    ),
    "updates_lost": Code(
        "the optimizer steps and the weights stay",
        ("weights in float32, 16 bits in autocast only", "a larger learning rate"),
    ),
    "shared_layers": Code(
        "they learn one set of weights for all places", ("a new layer for each place, or none",)
    ),
    "constant_inputs": Code(
        "there is nothing to tell rows apart by",
        ("look at where the inputs are read, scaled or masked",),
    ),
    "constant_targets": Code(
        "there is nothing to tell rows apart for, and the loss falls to nothing at once",
        ("look at where the targets are read, cast or divided",),
        "no network or learning rate finds classes that the targets do not have",
    ),
    "inputs_ignored": Code(
        "no step can teach it to tell rows apart",
        ("look at what enters and leaves the place that is named",),
        "no learning rate or number of steps helps",
    ),
    "loss_upside_down": Code(
        "every step makes the answers worse",
        ("turn the sign of the loss: optimizers minimise",),
        "a smaller learning rate only makes it worse more slowly",
    ),
    "padding_seen": Code(
        "the answer to a row depends on how long the longest row of its batch is",
        ("a padding mask in attention and means", "packed sequences", "the last true step"),
    ),
    "padding_in_loss": Code(
        "much of what is learned is to repeat the padding",
        ("ignore_index for the padding", "a mask on the loss"),
        "a loss that is low because padding is easy says nothing",
    ),
    "unrelated_labels": Code(
        "all that can be learned is the rows by heart",
        ("check that row k of the inputs belongs to target k", "other inputs"),
        "no learning rate, network or number of steps helps",
    ),
    "class_imbalance": Code(
        "the rare classes are never answered",
        ("class weights in the loss", "batches with as many of each class", "judge by recall"),
    ),
    "target_among_inputs": Code(
        "the network copies, and fails where the column is missing",
        ("take the column out of the inputs",),
    ),
    "valid_differs": Code(
        "validation judges another task than the one that is trained",
        ("one scaling for both, taken from the training rows", "a shuffled split"),
    ),
    "data_changed_in_place": Code(
        "what was learned in one epoch is wrong for the next",
        ("leave the stored rows as they are: a new tensor for each row that is read",),
        "no network or learning rate keeps up with data that change",
    ),
    "angle_wraps": Code(
        "two directions that are almost one are a full turn apart",
        ("two answers, cosine and sine of the angle; a loss of the difference on the circle",),
        "no network answers a jump that the inputs do not have",
    ),
    "rows_in_both": Code(
        "validation rewards rows learned by heart", ("split before anything repeats rows",)
    ),
    "sorted_batches": Code(
        "each batch pulls the network to its own class",
        ("shuffle the rows of an epoch",),
    ),
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
    "dropout_at_end": Code(
        "no weights give the answers that the loss wants", ("dropout in front of the last layer",)
    ),
    "dropout_before_norm": Code("train and test disagree", ("dropout after the norm",)),
    "batchnorm_batch_of_one": Code("outputs do not depend on inputs", ("LayerNorm", "batches")),
    "nothing_to_train": Code("no step changes anything", ("requires_grad_(True)",)),
    "frozen_parameters": Code(
        "they keep their values", ("requires_grad_(True) on the layers that must learn",)
    ),
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
_DISCONNECTED = (
    "loss_not_connected",
    "unregistered_parameters",
    "layers_made_in_forward",
    "detached",
)
_HOPELESS = (
    *_DISCONNECTED,
    "loss_ignores_targets",
    "posterior_collapse",
    "dropout_at_end",
    "loss_upside_down",
    "inputs_ignored",
    "shared_layers",
    "target_among_inputs",
    "constant_targets",
    "padding_seen",
    "padding_in_loss",
    "constant_inputs",
    "broadcast_loss",
    "rows_mixed",
    "positions_mixed",
    "target_out_of_range",
    "missing_log",
    "updates_lost",
    "data_changed_in_place",
    "unrelated_labels",
    "no_nonlinearity",
    "no_positions",
    "multilabel_softmax",
    "classes_as_numbers",
    "ignored_rows",
    "class_imbalance",
    "sorted_batches",
    "batchnorm_few_rows",
    "frozen_parameters",
    "missing_from_optimizer",
)
CONSEQUENCES: dict[str, tuple[str, ...]] = {
    "unused_parameters": _DISCONNECTED,
    "nothing_to_train": _DISCONNECTED,
    "future_visible": ("positions_mixed", "rows_mixed"),
    # a network that cannot learn is no witness of what its targets say
    "unrelated_labels": (
        *_DISCONNECTED,
        "loss_ignores_targets",
        "broadcast_loss",
        "rows_mixed",
        "positions_mixed",
        "no_nonlinearity",
        "frozen_parameters",
    ),
    # who cannot learn at all answers the largest class
    "class_imbalance": (
        *(code for code in _HOPELESS if code != "class_imbalance"),
        "head_mismatch",
    ),
    "frozen_parameters": ("poor_init",),  # what is trained has no gradient to begin with
    "overfitting": ("unrelated_labels", "valid_differs"),
    "train_eval_mismatch": ("rows_mixed", "batchnorm_few_rows", "random_in_eval"),
    "exploding_gradient": (
        "loss_is_a_sum",
        "loss_upside_down",
        "undefined_operation",
        "target_out_of_range",
        "missing_log",
        "unscaled_inputs",
        "unscaled_targets",
        "poor_init",
    ),
    "vanishing_gradient": (
        *_DISCONNECTED,
        "constant_inputs",
        "inputs_ignored",
        "poor_init",
        "head_mismatch",
        "dying_relu",
        "saturated_activation",
    ),
    "poor_init": ("inputs_ignored", "loss_not_connected"),
    "loss_upside_down": ("target_out_of_range", "missing_log"),
    "dying_relu": (
        "loss_is_a_sum",
        "constant_inputs",
        "inputs_ignored",
        "undefined_operation",
        "exploding_gradient",
        "poor_init",
        "head_mismatch",
        "unscaled_inputs",
    ),
    "saturated_activation": (
        "loss_is_a_sum",
        "loss_upside_down",
        "target_out_of_range",
        "missing_log",
        "poor_init",
        "unscaled_inputs",
    ),
    "oscillating_loss": (
        *_HOPELESS,
        "loss_is_a_sum",
        "saturated_activation",
        "unscaled_inputs",
        "exploding_gradient",
    ),
    "slow_convergence": (
        *_HOPELESS,
        "head_mismatch",
        "vanishing_gradient",
        "dying_relu",
        "saturated_activation",
        "poor_init",
        "unscaled_inputs",
    ),
    "underfitting": (
        *_HOPELESS,
        "excessive_dropout",
        "vanishing_gradient",
        "dying_relu",
        "saturated_activation",
        "poor_init",
        "oscillating_loss",
        "head_mismatch",
    ),
    "excessive_dropout": (),
}
