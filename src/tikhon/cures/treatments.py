"""All treatments, and which finding asks for which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn

from tikhon.cures import calls, data, sequences, surgery, wiring
from tikhon.cures.calls import CallRule
from tikhon.cures.surgery import each
from tikhon.cures.treatment import Treatment
from tikhon.diagnosis.wiring.split import MAX_COPY_DISTANCE

NOTHING = Treatment("nothing", 0)


def rate(factor: float) -> Treatment:
    """The learning rate times a factor."""
    code = f'for group in optimizer.param_groups:\n    group["lr"] *= {factor:g}'
    return Treatment(f"lr x{factor:g}", 1, "lr", setup=code)


def adam(lr: float) -> Treatment:
    """Adam at a learning rate, without weight decay."""
    code = f"optimizer = torch.optim.Adam(model.parameters(), lr={lr:g})"
    return Treatment(f"Adam {lr:g}", 2, "adam", setup=code)


def decay(strength: float) -> Treatment:
    """AdamW with decoupled weight decay."""
    code = f"optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay={strength:g})"
    name = f"weight decay {strength:g}"
    return Treatment(name, 3, "decay", setup=code, recipe={"decay": strength})


def _another_loss(value: str, *before: str) -> str:
    """Code that puts a loss of (output, y) in the place of the user's, now `plain_loss`."""
    body = "\n".join(f"    {line}" for line in (*before, f"return {value}"))
    return f"def loss(output, y, plain_loss=loss):\n{body}"


def _edit(name: str, size: int, edit: Callable[..., Any], **options: Any) -> Treatment:
    return Treatment(name, size, name, edit=edit, **options)


def _calls(name: str, lines: calls.Lines, own: str, **options: bool) -> Treatment:
    rule = CallRule("".join(re.findall(r"\w", name.title())), lines, **options)
    return Treatment(name, 2, name, rewrite=rule, own=own)


INIT = _edit("init with the right gain", 3, surgery.reinit)
LSUV = _edit("LSUV", 3, surgery.lsuv)
RECURRENT_INIT = _edit("gradient-preserving recurrent init", 3, surgery.recurrent_init)
MEMORY = _edit("chrono init", 3, surgery.long_memory)
FORGET = _edit("open forget gates", 3, partial(surgery.long_memory, closed=False))
RELU = _edit("ReLU", 6, surgery.to_relu)
LEAKY = _edit("leaky ReLU", 6, surgery.to_leaky)
GRU = _edit("GRU", 7, surgery.to_gru)
HEAD = _edit("an output layer that matches the loss", 1, surgery.open_head)
BATCHNORM = _edit("BatchNorm", 7, surgery.normalise)
LAYERNORM = _edit("LayerNorm", 7, partial(surgery.normalise, batchnorm=False))
NORMED_RELU = _edit("BatchNorm and ReLU", 8, partial(surgery.to_relu, normed=True))
RESIDUAL = _edit("residual connections with norms", 8, surgery.residual)
# Xiong et al., On layer normalization in the transformer architecture, 2020, arXiv 2002.04745
PRENORM = _edit(
    "pre-norm",
    4,
    each(
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
    each(TIMED, "{at}.batch_first = False", lambda layer: layer.batch_first),
)
ONE_DIRECTION = _edit("one direction", 4, wiring.one_direction, own="bidirectional=False")
PLACES = _edit(
    "positions in front of the attention",
    3,
    wiring.add_places,
    own="add a positional encoding to the embeddings",
)
SMOOTH = _edit(
    "Tanh in the place of ReLU", 4, each((nn.ReLU, nn.LeakyReLU, nn.ReLU6), "{at} = nn.Tanh()")
)
PARTED = _edit("layers of their own", 3, wiring.part)
GROUPS = _edit("groups of four channels", 2, wiring.larger_groups)
MOVING = _edit(
    "running statistics that move",
    1,
    each(
        (nn.modules.batchnorm._BatchNorm,),
        "{at}.momentum = 0.1",
        lambda layer: layer.momentum is not None and not 0.01 <= layer.momentum <= 0.5,
    ),
)
MADE_ONCE = _edit(
    "layers made once", 2, wiring.make_once, own="make these layers once, in __init__"
)
CARRYING = _edit(
    "inputs that carry gradients",
    1,
    wiring.carrying,
    own="checkpoint(..., use_reentrant=False)",
)
NONLINEAR = _edit("ReLU between the layers", 4, wiring.bend)
ROWS_FIRST = _edit(
    "batch_first", 1, each(TIMED, "{at}.batch_first = True", lambda layer: not layer.batch_first)
)
FLOAT32 = _edit("weights in float32", 2, wiring.to_float32)
REGISTER = _edit("registered layers", 1, wiring.register)
UNDROP = _edit("no dropout after the last layer", 1, wiring.undrop)
UNFREEZE = _edit("nothing frozen", 2, wiring.unfreeze)
WIDER = _edit("wider layers", 6, surgery.widen)
NARROWER = _edit("a smaller network", 5, surgery.narrow)
DROPOUT = _edit("dropout 0.5", 4, surgery.add_dropout, recipe={"dropout": 0.5})
EASE = _edit(
    "dropout 0.2",
    2,
    each((nn.modules.dropout._DropoutNd,), "{at}.p = 0.2", lambda layer: layer.p > 0.2),
    recipe={"dropout": 0.2},
)
INPUTS = Treatment("scaled inputs", 2, "scaling", scaled=data.scaled_inputs)
LOGARITHMS = Treatment("logarithms of the inputs", 2, "logarithms", scaled=data.logarithms)
APART = Treatment(
    "no copies of validation rows",
    1,
    "apart",
    rows=f"""\
x, seen = (t.flatten(1).double() for t in (x_train, x_valid))
near = torch.cat([torch.cdist(part, seen).min(1).values for part in x.split(1000)])
rows = near > {MAX_COPY_DISTANCE} * torch.cdist(x[:500], seen).median()
x_train, y_train = x_train[rows], y_train[rows]""",
    own="split first, and repeat or augment the training rows alone",
)


def _of_row(name: str, shift: int) -> Treatment:
    code = f"y_train = y_train.roll({shift}, 0)"
    own = "pair each row with its own target: print five of both side by side"
    return Treatment(f"the target of the row {name}", 1, "shift", rows=code, own=own)


ROW_BEFORE, ROW_BEHIND = _of_row("before", 1), _of_row("behind", -1)
TARGETS = Treatment("scaled targets", 3, "scaling", scaled=data.scaled_targets)
ADOPT = Treatment(
    "all parameters in the optimizer",
    1,
    "adopt",
    lacking=True,
    setup="""\
held = {id(p) for group in optimizer.param_groups for p in group["params"]}
missing = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
optimizer.add_param_group({"params": missing})""",
)
RESHAPE = Treatment(
    "targets in the shape of the output",
    1,
    "shape",
    setup=_another_loss("plain_loss(output, y.reshape(output.shape))"),
)
MEAN = Treatment(
    "mean over the rows",
    1,
    "mean",
    setup=_another_loss("plain_loss(output, y) / len(y)"),
)
LOG_SOFTMAX = Treatment(
    "log_softmax before the loss",
    1,
    "logarithm",
    setup=_another_loss("plain_loss(torch.log_softmax(output, 1), y)"),
)
LOG = Treatment(
    "logarithm of the probabilities",
    1,
    "logarithm",
    setup=_another_loss("plain_loss(output.clamp_min(1e-8).log(), y)"),
)
BY_CLASS = Treatment(
    "every class counts alike",
    1,
    "classes",
    own="nn.CrossEntropyLoss(weight=len(y) / (classes * y.bincount().float()))",
    setup=_another_loss(
        "sum(plain_loss(output[rows], y[rows]) for rows in kinds) / len(kinds)",
        "kinds = [(y == kind).reshape(len(y), -1).all(1) for kind in y.unique()]",
    ),
)
SQUASHED = Treatment(
    "a sigmoid before the loss",
    1,
    "sigmoids",
    setup=_another_loss("plain_loss(torch.sigmoid(output), y)"),
)
SIGMOIDS = Treatment(
    "a sigmoid for each class", 1, "sigmoids", setup="loss = nn.BCEWithLogitsLoss()"
)
AXES = _calls(
    "axes in order before a view",
    calls.kept_axes,
    "x.permute(...) or x.transpose(...) before the view, so that it joins whole axes",
)
SECOND_AXIS = _calls("softmax over axis 1", partial(calls.softmax_over, 1), "softmax(dim=1)")
OF_EACH_ROW = _calls(
    "statistics of each row",
    calls.of_each_row,
    "x.mean(1, keepdim=True) for x.mean(): of each row, not of the batch",
    inner=True,
)
HALF_TURNS = _calls(
    "angles in half turns",
    calls.in_half_turns,
    "torch.sin(math.pi * 2**k * x), and cos alike",
    inner=True,
)
GIVEN_GOALS = _calls(
    "no gradient through the goal",
    calls.given_goals,
    "goal = reward + discount * following.detach()",
)
LAST_AXIS = _calls(
    "softmax over the last axis", partial(calls.softmax_over, -1), "softmax(dim=-1)"
)
JOINED = _calls(
    "nothing detached",
    calls.joined,
    "no .detach(), .data, .item(), round or no_grad between the weights and the loss",
    everywhere=True,
)
STEADY = _calls(
    "no draws in evaluation mode",
    calls.steady,
    "F.dropout(x, training=self.training); other draws under if self.training",
    evaluated=True,
)
BARE = _calls(
    "no function behind the last layer",
    calls.bare_head,
    "return what the last layer gives, as it is",
    counted=True,
)
HEARD = _calls(
    "no class left out of the loss",
    calls.heard,
    "the loss without ignore_index, and without weights of 0",
)
ONE_SHAPE = _calls(
    "one shape inside of the loss", calls.one_shape, "y.view_as(output) before the two meet"
)
SAFE = _calls(
    "logarithms and roots away from their edge",
    calls.safe,
    "x.clamp_min(1e-8) inside of log, sqrt and divisions",
)
CAUSAL = _calls(
    "a causal mask",
    sequences.causal,
    "a causal mask for attention; convolutions padded in front alone",
)
EXCHANGED = _calls(
    "answer and target exchanged", calls.exchanged, "loss(output, target): the output first"
)
LOGGED = _calls(
    "logarithms inside of the loss",
    calls.logged,
    "log_softmax for the loss in the place of what it gets",
)
WEIGHED_LATE = _calls(
    "the weight of each row before the mean",
    calls.weighed_late,
    '(weight * loss(output, y, reduction="none")).mean()',
    counted=True,
)
SUMMED = _calls(
    "sums over the entries of a row",
    calls.summed,
    "a sum over the entries of a row, then a mean over the rows",
)
PADDING_LEFT_OUT = _calls(
    "padding left out of the loss", calls.padding_left_out, "ignore_index=0 in the loss"
)
WORDS_ALONE = _calls(
    "words without padding",
    sequences.without_padding,
    "pack_padded_sequence before recurrent layers, key_padding_mask in attention, means over "
    "the words alone",
    padded=True,
)
TURNED_MASKS = _calls("masks turned round", sequences.turned_masks, "~mask")
MASKS_OF_KEYS = _calls(
    "masks of keys", sequences.masks_of_keys, "mask[:, None, :]: it hides keys, the last axis"
)
BACK = Treatment(
    "labels moved back by one",
    1,
    "shift",
    setup=_another_loss("plain_loss(output, torch.cat([y[:, :1], y[:, :-1]], 1))"),
)
ON_A_CIRCLE = Treatment(
    "the difference of angles on a circle",
    1,
    "circle",
    setup="def loss(output, y):\n    return (1 - (output - y.reshape(output.shape)).cos()).mean()",
)
YES_AND_NO = _calls(
    "yes and no count alike",
    calls.yes_and_no,
    "nn.BCEWithLogitsLoss(pos_weight=(1 - share) / share), share of the ones",
)
BEGUN = Treatment("the word before as input", 1, "shift", scaled=data.begun)
CLASSES_ALIKE = _calls(
    "weights of classes",
    calls.classes_alike,
    "nn.CrossEntropyLoss(weight=y.numel() / (classes * y.flatten().bincount().float()))",
)
ONE_UNIT = _calls("a sigmoid of one unit", calls.one_unit, "torch.sigmoid(x)")
NEXT = Treatment("targets one position later", 1, "shift", scaled=data.next_position)
FILLED = Treatment(
    "0 for numbers that are not finite",
    1,
    "finite",
    scaled=data.filled,
    own="fill the gaps in the data, with 0 or the mean of the column",
)
UNLEAKED = Treatment("columns of the target set to 0", 1, "columns", scaled=data.without_copies)
SHUFFLED = Treatment("shuffle=True", 1, "order", scaled=data.shuffled)
FINITE = Treatment(
    "finite rows alone",
    1,
    "finite",
    rows="""\
rows = x_train.flatten(1).isfinite().all(1) & y_train.reshape(len(y_train), -1).isfinite().all(1)
x_train, y_train = x_train[rows], y_train[rows]""",
)
TO_ONE = Treatment("targets scaled to 0…1", 1, "scaling", scaled=data.fitted_to_one)
TURN = Treatment(
    "loss with the other sign",
    1,
    "sign",
    setup=_another_loss("-plain_loss(output, y)"),
)
DESCEND = Treatment(
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
FREE = Treatment("no penalty", 2, "penalty", free=True)
BATCH = Treatment("batches of 32", 2, "batch", setup="batch_size = 32", batch=32)
EARLY = Treatment(
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

_SIGNAL = (
    INIT,
    LSUV,
    RELU,
    BATCHNORM,
    NORMED_RELU,
    LAYERNORM,
    RESIDUAL,
    BLOCKS,
    PRENORM,
)
_TIME = (RECURRENT_INIT, MEMORY, FORGET, GRU, CLIP)
FOR: dict[str, tuple[Treatment, ...]] = {
    "vanishing_gradient": (*_TIME, *_SIGNAL, HEAD),
    "exploding_gradient": (CLIP, INPUTS, TARGETS, *_SIGNAL, *_TIME, WARMUP),
    "dying_relu": (
        *(
            INIT,
            LEAKY,
            LSUV,
            LOGARITHMS,
            BATCHNORM,
            HEAD,
            INPUTS,
            LAYERNORM,
            CLIP,
            WARMUP,
            PRENORM,
        ),
    ),
    "saturated_activation": (INIT, INPUTS, RELU, BATCHNORM, LAYERNORM, RECURRENT_INIT, PRENORM),
    "poor_init": (*_SIGNAL,),
    "oscillating_loss": (BATCH, CLIP, INPUTS, WARMUP, PRENORM),
    "slow_convergence": (HEAD, INPUTS, RELU, BATCHNORM, INIT, MEMORY, HALF_TURNS, SUMMED),
    "overfitting": (DROPOUT, EARLY, decay(0.1), decay(1.0), NARROWER),
    "underfitting": (
        FREE,
        EASE,
        WIDER,
        BATCH,
        INIT,
        INPUTS,
        WARMUP,
        MEMORY,
        PRENORM,
        BLOCKS,
        NONLINEAR,
        UNFREEZE,
        HALF_TURNS,
    ),
    "head_mismatch": (ONE_UNIT, HEAD, BARE, SQUASHED),
    "unscaled_inputs": (INPUTS, LOGARITHMS),
    "unscaled_targets": (TARGETS,),
    "excessive_dropout": (EASE,),
    "batchnorm_batch_of_one": (BATCH,),
    "batchnorm_few_rows": (BATCH, MOVING),
    "no_nonlinearity": (NONLINEAR, SMOOTH),
    "rows_mixed": (ROWS_FIRST, COLUMNS_FIRST, AXES, SECOND_AXIS, LAST_AXIS, OF_EACH_ROW),
    "positions_mixed": (AXES,),
    "detached": (JOINED, CARRYING),
    "loss_not_connected": (JOINED,),
    "random_in_eval": (STEADY,),
    "ignored_rows": (HEARD,),
    "undefined_operation": (SAFE,),
    "future_visible": (CAUSAL, ONE_DIRECTION),
    "no_positions": (PLACES,),
    "target_among_inputs": (UNLEAKED, NEXT, BEGUN),
    "sorted_batches": (SHUFFLED,),
    "non_finite_data": (FINITE, FILLED),
    "frozen_parameters": (UNFREEZE,),
    "shifted_twice": (BACK,),
    "target_not_detached": (GIVEN_GOALS,),
    "layers_made_in_forward": (MADE_ONCE,),
    "loss_mixes_rows": (WEIGHED_LATE,),
    "posterior_collapse": (SUMMED,),
    "padding_in_loss": (PADDING_LEFT_OUT,),
    "padding_seen": (WORDS_ALONE, TURNED_MASKS, MASKS_OF_KEYS),
    "inputs_ignored": (GROUPS, TURNED_MASKS, LOGARITHMS),
    "rows_in_both": (APART,),
    "unrelated_labels": (ROW_BEHIND, ROW_BEFORE),
    "shared_layers": (PARTED,),
    "train_eval_mismatch": (MOVING, BATCH),
    "angle_wraps": (ON_A_CIRCLE,),
    "updates_lost": (FLOAT32,),
    "nothing_to_train": (UNFREEZE,),
    "missing_from_optimizer": (ADOPT,),
    "broadcast_loss": (RESHAPE, ONE_SHAPE),
    "loss_upside_down": (TURN, DESCEND, EXCHANGED),
    "loss_is_a_sum": (MEAN,),
    "missing_log": (LOG, LOG_SOFTMAX, LOGGED),
    "multilabel_softmax": (SIGMOIDS,),
    "class_imbalance": (BY_CLASS, YES_AND_NO, CLASSES_ALIKE),
    "target_out_of_range": (TO_ONE, EXCHANGED),
    "unregistered_parameters": (REGISTER,),
    "dropout_at_end": (UNDROP,),
    "collapsed_attention": (WARMUP, INIT, PRENORM),
}
# Losses that are meant where the user's is the fault: the first that works judges the treatments
MEANT: dict[str, tuple[Treatment, ...]] = {
    "class_imbalance": (BY_CLASS, YES_AND_NO, CLASSES_ALIKE),
    "broadcast_loss": (RESHAPE, ONE_SHAPE),
    "missing_log": (LOGGED, LOG_SOFTMAX, LOG),
    "multilabel_softmax": (SIGMOIDS,),
    "head_mismatch": (SQUASHED,),
    "loss_upside_down": (EXCHANGED, TURN),
    "ignored_rows": (HEARD,),
    "undefined_operation": (SAFE,),
    "loss_not_connected": (JOINED,),
    "posterior_collapse": (SUMMED,),
    "shifted_twice": (BACK,),
    "loss_mixes_rows": (WEIGHED_LATE,),
    "padding_in_loss": (PADDING_LEFT_OUT,),
    "target_out_of_range": (EXCHANGED,),
    "angle_wraps": (ON_A_CIRCLE,),
}
SLOWER, FASTER = rate(0.1), rate(10.0)
RATES = (rate(0.01), SLOWER, rate(0.3), rate(3.0), FASTER, rate(100.0), rate(1000.0))
ADAMS = (adam(1e-3), adam(1e-2))


SYMPTOMS = {
    *("vanishing_gradient", "exploding_gradient", "dying_relu", "saturated_activation"),
    *("poor_init", "oscillating_loss", "slow_convergence", "overfitting", "underfitting"),
    *("collapsed_attention", "train_eval_mismatch"),
}
# What a learning rate, another optimizer or a shorter run may cure; any other fault stays under
# them, whatever the loss says.
YIELDING = SYMPTOMS | {
    *("unscaled_inputs", "unscaled_targets", "loss_is_a_sum", "updates_lost"),
    *("excessive_dropout", "batchnorm_few_rows", "batchnorm_batch_of_one"),
}


# Faults of what training is judged by: no treatment of the training mends them, or is kept off by
# them.
OF_VALIDATION = {"rows_in_both", "valid_differs"}


def named(codes: Iterable[str]) -> set[str]:
    """Names of the treatments that the findings name first: all of a fault, two of a symptom."""
    return {t.name for code in codes for t in FOR.get(code, ())[: 2 if code in YIELDING else None]}


def candidates(codes: Sequence[str]) -> list[Treatment]:
    """All treatments for these findings, the first in front.

    Learning rates, Adam, edits, and both together.
    """
    edits: dict[str, Treatment] = {}
    for code in codes:
        edits |= {t.name: t for t in FOR.get(code, ())}
    if set(codes) == {"overfitting"}:
        return [rate(0.01), SLOWER, *edits.values()]
    treatments = [SLOWER, FASTER, ADAMS[0], *edits.values()]  # what a short budget must reach
    for edit in edits.values():
        treatments += [] if edit.replaces_optimizer else [edit & rate(0.2), edit & adam(1e-3)]
        treatments += [edit & rate(10.0)] if edit.kind == INPUTS.kind else []
        if edit.kind in (GRU.name, RECURRENT_INIT.name, MEMORY.name, FORGET.name):
            treatments += [edit & adam(1e-2) & CLIP, edit & adam(1e-3) & CLIP]
    always = (EASE, *RATES, *ADAMS)  # a rate of dropout may well be no finding
    return [*treatments, *(a for a in always if a not in treatments)]
