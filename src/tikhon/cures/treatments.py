"""All treatments, and which finding asks for which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn

from tikhon.cures import calls, data, sequences, surgery, wiring
from tikhon.cures.calls import CallRule
from tikhon.cures.surgery import edit_modules
from tikhon.cures.treatment import Treatment
from tikhon.diagnosis.wiring.split import MAX_COPY_DISTANCE

UNTREATED = Treatment("nothing", 0)


def rate(factor: float) -> Treatment:
    """Return a treatment that multiplies the learning rate."""
    code = f'for group in optimizer.param_groups:\n    group["lr"] *= {factor:g}'
    return Treatment(f"lr x{factor:g}", 1, "lr", setup=code)


def adam(lr: float) -> Treatment:
    """Return a treatment with Adam, without weight decay."""
    code = f"optimizer = torch.optim.Adam(model.parameters(), lr={lr:g})"
    return Treatment(f"Adam {lr:g}", 2, "adam", setup=code)


def decay(strength: float) -> Treatment:
    """Return a treatment with AdamW and decoupled weight decay."""
    code = f"optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay={strength:g})"
    name = f"weight decay {strength:g}"
    return Treatment(name, 3, "decay", setup=code, recipe={"decay": strength})


def _loss(name: str, kind: str, value: str, *before: str, **options: Any) -> Treatment:
    """Return a treatment with a loss of (output, y); the user's is `plain_loss`."""
    body = "\n".join(f"    {line}" for line in (*before, f"return {value}"))
    code = f"def loss(output, y, plain_loss=loss):\n{body}"
    return Treatment(name, 1, kind, setup=code, **options)


def _edit(name: str, size: int, edit: Callable[..., Any], **options: Any) -> Treatment:
    return Treatment(name, size, name, edit=edit, **options)


def _calls(name: str, lines: calls.RuleLines, code_fix: str, **options: bool) -> Treatment:
    rule = CallRule("".join(re.findall(r"\w", name.title())), lines, **options)
    return Treatment(name, 2, name, rewrite=rule, code_fix=code_fix)


INIT = _edit("init with the right gain", 3, surgery.reinit)
LSUV = _edit("LSUV", 3, surgery.lsuv)
RECURRENT_INIT = _edit("gradient-preserving recurrent init", 3, surgery.recurrent_init)
CHRONO_INIT = _edit("chrono init", 3, surgery.chrono_init)
OPEN_FORGET_GATES = _edit("open forget gates", 3, partial(surgery.chrono_init, closed=False))
RELU = _edit("ReLU", 6, surgery.to_relu)
LEAKY = _edit("leaky ReLU", 6, surgery.to_leaky)
GRU = _edit("GRU", 7, surgery.to_gru)
MATCHING_HEAD = _edit("an output layer that matches the loss", 1, surgery.remove_head_activation)
BATCHNORM = _edit("BatchNorm", 7, surgery.normalise)
LAYERNORM = _edit("LayerNorm", 7, partial(surgery.normalise, batchnorm=False))
NORMED_RELU = _edit("BatchNorm and ReLU", 8, partial(surgery.to_relu, normed=True))
RESIDUAL = _edit("residual connections with norms", 8, surgery.residual)
# Xiong et al., On layer normalization in the transformer architecture, 2020, arXiv 2002.04745
PRENORM = _edit(
    "pre-norm",
    4,
    edit_modules(
        (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
        "{at}.norm_first = True",
        lambda layer: not layer.norm_first,
    ),
)
BLOCKS = _edit("zero-initialized residual branches with norms", 5, surgery.norm_blocks)
TIMED = (nn.RNNBase, nn.MultiheadAttention)
COLUMNS_FIRST = _edit(
    "batch_first=False",
    1,
    edit_modules(TIMED, "{at}.batch_first = False", lambda layer: layer.batch_first),
)
ONE_DIRECTION = _edit(
    "one direction", 4, wiring.forward_direction_only, code_fix="bidirectional=False"
)
POSITIONAL_ENCODING = _edit(
    "positions in front of the attention",
    3,
    wiring.add_positions,
    code_fix="add a positional encoding to the embeddings",
)
TANH = _edit(
    "Tanh in the place of ReLU",
    4,
    edit_modules((nn.ReLU, nn.LeakyReLU, nn.ReLU6), "{at} = nn.Tanh()"),
)
UNSHARED_LAYERS = _edit("layers of their own", 3, wiring.unshare_layers)
SPREAD_EMBEDDINGS = _edit("standardised embeddings", 2, wiring.spread_embeddings)
LARGER_GROUPS = _edit("groups of four channels", 2, wiring.larger_groups)
RUNNING_STATISTICS = _edit(
    "running statistics that move",
    1,
    edit_modules(
        (nn.modules.batchnorm._BatchNorm,),
        "{at}.momentum = 0.1",
        lambda layer: layer.momentum is not None and not 0.01 <= layer.momentum <= 0.5,
    ),
)
LAYERS_IN_INIT = _edit(
    "layers made once",
    2,
    wiring.keep_created_layers,
    code_fix="make these layers once, in __init__",
)
INPUTS_REQUIRING_GRAD = _edit(
    "inputs that carry gradients",
    1,
    wiring.inputs_requiring_grad,
    code_fix="checkpoint(..., use_reentrant=False)",
)
NONLINEAR = _edit("ReLU between the layers", 4, wiring.add_nonlinearity)
ROWS_FIRST = _edit(
    "batch_first",
    1,
    edit_modules(TIMED, "{at}.batch_first = True", lambda layer: not layer.batch_first),
)
FLOAT32 = _edit("weights in float32", 2, wiring.to_float32)
REGISTERED_LAYERS = _edit("registered layers", 1, wiring.register_layers)
NO_FINAL_DROPOUT = _edit("no dropout after the last layer", 1, wiring.remove_final_dropout)
NO_GRADIENT_HOOKS = _edit(
    "gradients without hooks",
    1,
    wiring.remove_gradient_hooks,
    code_fix="no register_hook on parameters",
)
UNFREEZE = _edit("nothing frozen", 2, wiring.unfreeze)
WIDER = _edit("wider layers", 6, surgery.widen)
NARROWER = _edit("a smaller network", 5, surgery.narrow)
DROPOUT = _edit("dropout 0.5", 4, surgery.add_dropout, recipe={"dropout": 0.5})
LESS_DROPOUT = _edit(
    "dropout 0.2",
    2,
    edit_modules((nn.modules.dropout._DropoutNd,), "{at}.p = 0.2", lambda layer: layer.p > 0.2),
    recipe={"dropout": 0.2},
)
SCALED_INPUTS = Treatment("scaled inputs", 2, "scaling", data_edit=data.scale_inputs)
LOG_INPUTS = Treatment("logarithms of the inputs", 2, "logarithms", data_edit=data.log_inputs)
NO_DUPLICATES = Treatment(
    "no copies of validation rows",
    1,
    "apart",
    rows=f"""\
x, seen = (t.flatten(1).double() for t in (x_train, x_valid))
near = torch.cat([torch.cdist(part, seen).min(1).values for part in x.split(1000)])
rows = near > {MAX_COPY_DISTANCE} * torch.cdist(x[:500], seen).median()
x_train, y_train = x_train[rows], y_train[rows]""",
    code_fix="split first, and repeat or augment the training rows alone",
)


def _of_row(name: str, shift: int) -> Treatment:
    code = f"y_train = y_train.roll({shift}, 0)"
    code_fix = "pair each row with its own target: print five of both side by side"
    return Treatment(f"the target of the row {name}", 1, "shift", rows=code, code_fix=code_fix)


TARGET_OF_ROW_BEFORE, TARGET_OF_ROW_AFTER = _of_row("before", 1), _of_row("behind", -1)
SCALED_TARGETS = Treatment("scaled targets", 3, "scaling", data_edit=data.scale_targets)
ALL_PARAMETERS = Treatment(
    "all parameters in the optimizer",
    1,
    "adopt",
    only_if_missing=True,
    setup="""\
held = {id(p) for group in optimizer.param_groups for p in group["params"]}
missing = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
optimizer.add_param_group({"params": missing})""",
)
RESHAPED_TARGETS = _loss(
    "targets in the shape of the output", "shape", "plain_loss(output, y.reshape(output.shape))"
)
MEAN_OVER_ROWS = _loss("mean over the rows", "mean", "plain_loss(output, y) / len(y)")
LOG_SOFTMAX = _loss(
    "log_softmax before the loss", "logarithm", "plain_loss(torch.log_softmax(output, 1), y)"
)
LOG_OF_PROBABILITIES = _loss(
    "logarithm of the probabilities", "logarithm", "plain_loss(output.clamp_min(1e-8).log(), y)"
)
BALANCED_CLASSES = _loss(
    "every class counts alike",
    "classes",
    "sum(plain_loss(output[rows], y[rows]) for rows in kinds) / len(kinds)",
    "kinds = [(y == kind).reshape(len(y), -1).all(1) for kind in y.unique()]",
    code_fix="nn.CrossEntropyLoss(weight=len(y) / (classes * y.bincount().float()))",
)
SIGMOID_BEFORE_LOSS = _loss(
    "a sigmoid before the loss", "sigmoids", "plain_loss(torch.sigmoid(output), y)"
)
SIGMOID_PER_CLASS = Treatment(
    "a sigmoid for each class",
    1,
    "sigmoids",
    setup="loss = nn.BCEWithLogitsLoss()",
    code_fix="predict with torch.sigmoid(output) > 0.5, where a softmax was read",
)
AXES_IN_ORDER = _calls(
    "axes in order before a view",
    calls.keep_axes_order,
    "x.permute(...) or x.transpose(...) before the view, so that it joins whole axes",
)
SOFTMAX_OVER_AXIS_1 = _calls(
    "softmax over axis 1", partial(calls.softmax_over, 1), "softmax(dim=1)"
)
ROW_STATISTICS = _calls(
    "statistics of each row",
    calls.per_row_statistics,
    "x.mean(1, keepdim=True) for x.mean(): of each row, not of the batch",
    model_only=True,
)
COORDINATES_TIMES_PI = _calls(
    "angles in half turns",
    calls.coordinates_times_pi,
    "torch.sin(math.pi * 2**k * x), and cos alike",
    model_only=True,
)
DETACHED_GOALS = _calls(
    "no gradient through the goal",
    calls.detach_goals,
    "goal = reward + discount * following.detach()",
)
SOFTMAX_OVER_LAST_AXIS = _calls(
    "softmax over the last axis", partial(calls.softmax_over, -1), "softmax(dim=-1)"
)
NOTHING_DETACHED = _calls(
    "nothing detached",
    calls.keep_attached,
    "no .detach(), .data, .item(), round or no_grad between the weights and the loss",
    both_sides=True,
)
NO_NOISE_IN_EVAL = _calls(
    "no draws in evaluation mode",
    calls.disable_noise,
    "F.dropout(x, training=self.training); other draws under if self.training",
    eval_only=True,
)
NO_HEAD_ACTIVATION = _calls(
    "no function behind the last layer",
    calls.remove_head_function,
    "return what the last layer gives, as it is",
    counts_calls=True,
)
NO_IGNORED_CLASSES = _calls(
    "no class left out of the loss",
    partial(calls.set_options, '"ignore_index": -100, "weight": None'),
    "the loss without ignore_index, and without weights of 0",
)
ONE_SHAPE_IN_LOSS = _calls(
    "one shape inside of the loss", calls.match_shapes, "y.view_as(output) before the two meet"
)
CLAMPED_FUNCTIONS = _calls(
    "logarithms and roots away from their edge",
    calls.clamp_functions,
    "x.clamp_min(1e-8) inside of log, sqrt and divisions",
)
CAUSAL_MASK = _calls(
    "a causal mask",
    sequences.causal_mask,
    "a causal mask for attention; convolutions padded in front alone",
)
SWAPPED_ARGUMENTS = _calls(
    "answer and target exchanged", calls.swap_arguments, "loss(output, target): the output first"
)
LOG_INSIDE_LOSS = _calls(
    "logarithms inside of the loss",
    calls.log_inside_loss,
    "log_softmax for the loss in the place of what it gets",
)
WEIGHTS_BEFORE_MEAN = _calls(
    "the weight of each row before the mean",
    calls.weights_before_mean,
    '(weight * loss(output, y, reduction="none")).mean()',
    counts_calls=True,
)
SUM_OVER_ENTRIES = _calls(
    "sums over the entries of a row",
    calls.sum_over_entries,
    "a sum over the entries of a row, then a mean over the rows",
)
NO_PADDING_IN_LOSS = _calls(
    "padding left out of the loss",
    partial(calls.set_options, '"ignore_index": 0'),
    "ignore_index=0 in the loss",
)
NO_PADDING_IN_MODEL = _calls(
    "words without padding",
    sequences.skip_padding,
    "pack_padded_sequence before recurrent layers, key_padding_mask in attention, means over "
    "the words alone",
    needs_padding=True,
)
INVERTED_MASKS = _calls("masks turned round", sequences.invert_masks, "~mask")
KEY_MASKS = _calls(
    "masks of keys", sequences.key_masks, "mask[:, None, :]: it hides keys, the last axis"
)
SHIFTED_BACK = _loss(
    "labels moved back by one", "shift", "plain_loss(output, torch.cat([y[:, :1], y[:, :-1]], 1))"
)
CIRCULAR_LOSS = Treatment(
    "the difference of angles on a circle",
    1,
    "circle",
    setup="def loss(output, y):\n    return (1 - (output - y.reshape(output.shape)).cos()).mean()",
)
POSITIVE_WEIGHTS = _calls(
    "yes and no count alike",
    calls.weigh_positives,
    "nn.BCEWithLogitsLoss(pos_weight=(1 - share) / share), share of the ones",
)
SHIFTED_DECODER_INPUT = Treatment(
    "the word before as input", 1, "shift", data_edit=data.shift_decoder_input
)
CLASS_WEIGHTS = _calls(
    "weights of classes",
    calls.balance_classes,
    "nn.CrossEntropyLoss(weight=y.numel() / (classes * y.flatten().bincount().float()))",
)
SIGMOID_OF_ONE_UNIT = _calls(
    "a sigmoid of one unit", calls.sigmoid_for_one_unit, "torch.sigmoid(x)"
)
NEXT_POSITION_TARGETS = Treatment(
    "targets one position later", 1, "shift", data_edit=data.shift_targets
)
FILLED_GAPS = Treatment(
    "0 for numbers that are not finite",
    1,
    "finite",
    data_edit=data.fill_gaps,
    code_fix="fill the gaps in the data, with 0 or the mean of the column",
)
NO_TARGET_COLUMNS = Treatment(
    "columns of the target set to 0", 1, "columns", data_edit=data.drop_target_columns
)
SHUFFLE = Treatment("shuffle=True", 1, "order", data_edit=data.shuffle_rows)
FINITE_ROWS = Treatment(
    "finite rows alone",
    1,
    "finite",
    rows="""\
rows = x_train.flatten(1).isfinite().all(1) & y_train.reshape(len(y_train), -1).isfinite().all(1)
x_train, y_train = x_train[rows], y_train[rows]""",
)
TARGETS_TO_UNIT_RANGE = Treatment(
    "targets scaled to 0…1", 1, "scaling", data_edit=data.scale_targets_to_unit_range
)
NEGATED_LOSS = _loss("loss with the other sign", "sign", "-plain_loss(output, y)")
NO_MAXIMIZE = Treatment(
    "maximize=False",
    1,
    "sign",
    setup='for group in optimizer.param_groups:\n    group["maximize"] = False',
)
CLIP = Treatment(
    "gradient clipping",
    2,
    "clip",
    recipe={"clip_norm": 1.0},
    setup="""\
def clip(*_):
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


optimizer.register_step_pre_hook(clip)""",
)
WARMUP = Treatment(
    "learning-rate warm-up",
    2,
    "warmup",
    setup="""\
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 50, total_iters=49)
optimizer.register_step_post_hook(lambda *_: schedule.step())""",
)
NO_PENALTY = Treatment("no penalty", 2, "penalty", without_penalty=True)
BATCHES_OF_32 = Treatment("batches of 32", 2, "batch", setup="batch_size = 32", batch=32)
EARLY_STOPPING = Treatment(
    "early stopping",
    2,
    "early",
    recipe={"early_stopping": 5},
    setup="""\
best = {"loss": math.inf, "steps": 0}


def keep_the_best(*_):
    best["steps"] += 1
    if best["steps"] % 10:
        return
    model.eval()
    with torch.no_grad():
        now = float(loss(model(x_valid), y_valid))
    model.train()
    if now < best["loss"]:
        best.update(loss=now, state=copy.deepcopy(model.state_dict()))


optimizer.register_step_post_hook(keep_the_best)""",
    after='if "state" in best:\n    model.load_state_dict(best["state"])',
)

_SIGNAL = (INIT, LSUV, RELU, BATCHNORM, NORMED_RELU, LAYERNORM, RESIDUAL, BLOCKS, PRENORM)
_TIME = (RECURRENT_INIT, CHRONO_INIT, OPEN_FORGET_GATES, GRU, CLIP)
TREATMENTS_BY_CODE: dict[str, tuple[Treatment, ...]] = {
    "vanishing_gradient": (*_TIME, *_SIGNAL, MATCHING_HEAD),
    "exploding_gradient": (CLIP, SCALED_INPUTS, SCALED_TARGETS, *_SIGNAL, *_TIME, WARMUP),
    "dying_relu": (
        *(INIT, LEAKY, LSUV, LOG_INPUTS, BATCHNORM, MATCHING_HEAD, SCALED_INPUTS, LAYERNORM),
        *(CLIP, WARMUP, PRENORM),
    ),
    "saturated_activation": (
        *(INIT, SCALED_INPUTS, RELU, BATCHNORM, LAYERNORM, RECURRENT_INIT, PRENORM),
    ),
    "poor_init": (*_SIGNAL,),
    "oscillating_loss": (BATCHES_OF_32, CLIP, SCALED_INPUTS, WARMUP, PRENORM),
    "slow_convergence": (
        *(MATCHING_HEAD, SCALED_INPUTS, RELU, BATCHNORM, INIT, CHRONO_INIT),
        *(COORDINATES_TIMES_PI, SUM_OVER_ENTRIES, NO_GRADIENT_HOOKS),
    ),
    "overfitting": (DROPOUT, EARLY_STOPPING, decay(0.1), decay(1.0), NARROWER),
    "underfitting": (
        *(NO_PENALTY, LESS_DROPOUT, WIDER, BATCHES_OF_32, INIT, SCALED_INPUTS, WARMUP),
        *(CHRONO_INIT, PRENORM, BLOCKS, NONLINEAR, UNFREEZE, COORDINATES_TIMES_PI),
    ),
    "head_mismatch": (SIGMOID_OF_ONE_UNIT, MATCHING_HEAD, NO_HEAD_ACTIVATION, SIGMOID_BEFORE_LOSS),
    "unscaled_inputs": (SCALED_INPUTS, LOG_INPUTS),
    "unscaled_targets": (SCALED_TARGETS,),
    "excessive_dropout": (LESS_DROPOUT,),
    "batchnorm_batch_of_one": (BATCHES_OF_32,),
    "batchnorm_few_rows": (BATCHES_OF_32, RUNNING_STATISTICS),
    "no_nonlinearity": (NONLINEAR, TANH),
    "rows_mixed": (
        *(ROWS_FIRST, COLUMNS_FIRST, AXES_IN_ORDER, SOFTMAX_OVER_AXIS_1),
        *(SOFTMAX_OVER_LAST_AXIS, ROW_STATISTICS),
    ),
    "positions_mixed": (AXES_IN_ORDER,),
    "detached": (NOTHING_DETACHED, INPUTS_REQUIRING_GRAD),
    "loss_not_connected": (NOTHING_DETACHED,),
    "random_in_eval": (NO_NOISE_IN_EVAL,),
    "ignored_rows": (NO_IGNORED_CLASSES,),
    "undefined_operation": (CLAMPED_FUNCTIONS,),
    "future_visible": (CAUSAL_MASK, ONE_DIRECTION),
    "no_positions": (POSITIONAL_ENCODING,),
    "target_among_inputs": (NO_TARGET_COLUMNS, NEXT_POSITION_TARGETS, SHIFTED_DECODER_INPUT),
    "sorted_batches": (SHUFFLE,),
    "non_finite_data": (FINITE_ROWS, FILLED_GAPS),
    "frozen_parameters": (UNFREEZE,),
    "shifted_twice": (SHIFTED_BACK,),
    "target_not_detached": (DETACHED_GOALS,),
    "layers_made_in_forward": (LAYERS_IN_INIT,),
    "loss_mixes_rows": (WEIGHTS_BEFORE_MEAN,),
    "posterior_collapse": (SUM_OVER_ENTRIES,),
    "padding_in_loss": (NO_PADDING_IN_LOSS,),
    "padding_seen": (NO_PADDING_IN_MODEL, INVERTED_MASKS, KEY_MASKS),
    "inputs_ignored": (LARGER_GROUPS, INVERTED_MASKS, LOG_INPUTS),
    "embedding_collapse": (SPREAD_EMBEDDINGS,),
    "rows_in_both": (NO_DUPLICATES,),
    "unrelated_labels": (TARGET_OF_ROW_AFTER, TARGET_OF_ROW_BEFORE),
    "shared_layers": (UNSHARED_LAYERS,),
    "train_eval_mismatch": (RUNNING_STATISTICS, BATCHES_OF_32),
    "angle_wraps": (CIRCULAR_LOSS,),
    "updates_lost": (FLOAT32,),
    "nothing_to_train": (UNFREEZE,),
    "missing_from_optimizer": (ALL_PARAMETERS,),
    "broadcast_loss": (RESHAPED_TARGETS, ONE_SHAPE_IN_LOSS),
    "loss_upside_down": (NEGATED_LOSS, NO_MAXIMIZE, SWAPPED_ARGUMENTS),
    "loss_is_a_sum": (MEAN_OVER_ROWS,),
    "missing_log": (LOG_OF_PROBABILITIES, LOG_SOFTMAX, LOG_INSIDE_LOSS),
    "multilabel_softmax": (SIGMOID_PER_CLASS,),
    "class_imbalance": (BALANCED_CLASSES, POSITIVE_WEIGHTS, CLASS_WEIGHTS),
    "target_out_of_range": (TARGETS_TO_UNIT_RANGE, SWAPPED_ARGUMENTS),
    "unregistered_parameters": (REGISTERED_LAYERS,),
    "dropout_at_end": (NO_FINAL_DROPOUT,),
    "collapsed_attention": (WARMUP, INIT, PRENORM),
}
_LOSS_FAULTS = (
    *("class_imbalance", "broadcast_loss", "multilabel_softmax", "ignored_rows", "angle_wraps"),
    *("undefined_operation", "loss_not_connected", "posterior_collapse", "shifted_twice"),
    *("loss_mixes_rows", "padding_in_loss"),
)
# Corrected losses where the user's is the fault: the first that works scores the treatments
INTENDED_LOSSES: dict[str, tuple[Treatment, ...]] = {
    **{code: TREATMENTS_BY_CODE[code] for code in _LOSS_FAULTS},
    "missing_log": (LOG_INSIDE_LOSS, LOG_SOFTMAX, LOG_OF_PROBABILITIES),
    "head_mismatch": (SIGMOID_BEFORE_LOSS,),
    "loss_upside_down": (SWAPPED_ARGUMENTS, NEGATED_LOSS),
    "target_out_of_range": (SWAPPED_ARGUMENTS,),
}
SLOWER, FASTER = rate(0.1), rate(10.0)
RATES = (rate(0.01), SLOWER, rate(0.3), rate(3.0), FASTER, rate(100.0), rate(1000.0))
ADAMS = (adam(1e-3), adam(1e-2))


SYMPTOMS = {
    *("vanishing_gradient", "exploding_gradient", "dying_relu", "saturated_activation"),
    *("poor_init", "oscillating_loss", "slow_convergence", "overfitting", "underfitting"),
    *("collapsed_attention", "train_eval_mismatch"),
}
# What a learning rate, another optimizer or a shorter run may cure; other faults may not be
# cured by these, whatever the loss.
YIELDING = SYMPTOMS | {
    *("unscaled_inputs", "unscaled_targets", "loss_is_a_sum", "updates_lost"),
    *("embedding_collapse",),
    *("excessive_dropout", "batchnorm_few_rows", "batchnorm_batch_of_one"),
}


# Faults of the validation rows, which no treatment of the training can mend.
VALIDATION_FAULTS = {"rows_in_both", "valid_differs"}


# Edits to try where no finding has a treatment: scales that a look at the data may miss.
WITHOUT_FINDINGS = (SCALED_INPUTS, LOG_INPUTS, INIT, MATCHING_HEAD, BATCHNORM)


def treatment_names(codes: Iterable[str]) -> set[str]:
    """Return the names of the treatments to try first: all of a fault, two of a symptom."""
    return {
        t.name
        for code in codes
        for t in TREATMENTS_BY_CODE.get(code, ())[: 2 if code in YIELDING else None]
    }


def candidates(codes: Sequence[str]) -> list[Treatment]:
    """Return the treatments for these findings in order: rates, Adam, edits, and both together."""
    edits: dict[str, Treatment] = {}
    for code in codes:
        edits |= {t.name: t for t in TREATMENTS_BY_CODE.get(code, ())}
    edits = edits or {t.name: t for t in WITHOUT_FINDINGS}
    if set(codes) == {"overfitting"}:
        return [rate(0.01), SLOWER, *edits.values()]
    treatments = [SLOWER, FASTER, ADAMS[0], *edits.values()]  # what a short budget must reach
    for edit in edits.values():
        if not any("optimizer =" in part.setup for part in edit.parts or (edit,)):
            treatments += [edit & rate(0.2), edit & adam(1e-3)]
        treatments += [edit & rate(10.0)] if edit.kind == SCALED_INPUTS.kind else []
        if edit.kind in (GRU.name, RECURRENT_INIT.name, CHRONO_INIT.name, OPEN_FORGET_GATES.name):
            treatments += [edit & adam(1e-2) & CLIP, edit & adam(1e-3) & CLIP]
    always = (LESS_DROPOUT, *RATES, *ADAMS)  # a rate of dropout may well be no finding
    return [*treatments, *(a for a in always if a not in treatments)]
