"""Treatments: named edits with their size and their patch, and which finding asks for which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.cures import surgery
from tikhon.cures.patch import execute, script, with_imports
from tikhon.data.rows import Batch
from tikhon.diagnosis.replica import Replica
from tikhon.diagnosis.samples import Samples

BEFORE = "# before the optimizer is built"
SETUP = "# after the optimizer is built"
AFTER = "# after training"


@dataclass(frozen=True)
class Treatment:
    """One change of a program.

    `size` orders edits from small (a number) to large (an architecture). `edit` writes the lines
    that change the model; `setup` is code for after the optimizer is built, `after` for after
    training. `recipe` holds what a `Recipe` can say of it.
    """

    name: str
    size: int
    kind: str = ""
    edit: surgery.Edit | None = None
    setup: str = ""
    after: str = ""
    batch: int | None = None
    free: bool = False  # without penalty and weight decay
    scaled: str = ""  # "inputs" | "targets" | "to one"
    lacking: bool = False  # only where the optimizer lacks trainable tensors
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def __and__(self, other: Treatment) -> Treatment:
        """Both treatments: the edit of the first, the training of the second."""
        return replace(
            self,
            name=f"{self.name} + {other.name}",
            size=self.size + other.size,
            setup="\n".join(filter(None, (self.setup, other.setup))),
            after=self.after or other.after,
            batch=other.batch or self.batch,
            recipe={**self.recipe, **other.recipe},
        )

    def apply(self, replica: Replica, samples: Samples, judge: Batch | None = None) -> bool:
        """Treat the replica in place and leave the patch on it; False where it does not apply."""
        sections: list[str] = []
        if self.lacking and not _lacking(replica):
            return False
        if self.edit is not None:
            frozen = {id(p) for p in replica.model.parameters() if not p.requires_grad}
            code = _placed(script(self.edit(replica.model, samples.probe)), replica.model)
            if not code:
                return False
            space = execute(code, model=replica.model, x=samples.probe[0])
            replica.model = space["model"]
            _adopt(replica, frozen)
            sections += [BEFORE, code]
        if self.scaled:
            code = SCALINGS[self.scaled](replica, samples)
            if not code:
                return False
            sections += [BEFORE, code]
        setup = "\n".join(filter(None, (_released(replica) if self.free else "", self.setup)))
        if self.free and not setup:
            return False
        if setup:
            sections += [SETUP, setup]
            self._prepare(replica, setup, judge)
        if self.after:
            sections += [AFTER, self.after]
        replica.patch = with_imports("\n".join(sections))
        return True

    def is_optimizer_of(self, replica: Replica) -> bool:
        """Whether the setup makes the optimizer that the program has."""
        own = settings(replica.optimizer)
        space = execute(self.setup, model=replica.model, optimizer=replica.optimizer)
        return settings(space["optimizer"]) == own

    def _prepare(self, replica: Replica, setup: str, judge: Batch | None) -> None:
        names: dict[str, object] = {"x_valid": None, "y_valid": None}
        if judge is not None:
            names = {"x_valid": judge[0], "y_valid": judge[1]}
        space = execute(
            setup,
            model=replica.model,
            optimizer=replica.optimizer,
            loss=replica.loss,
            penalty=replica.penalty,
            **names,
        )
        replica.optimizer, replica.penalty = space["optimizer"], space["penalty"]
        replica.loss = space["loss"]
        if self.free:
            replica.terms = None
        if self.after:
            replica.finish = lambda: execute(self.after, **space)


def _placed(code: str, model: nn.Module) -> str:
    """The code with new layers moved to where the model is."""
    first = next(model.parameters(), torch.zeros(()))
    if code and (first.device.type != "cpu" or first.dtype != torch.float32):
        return f'{code}\nmodel.to("{first.device}", {first.dtype})'
    return code


def _adopt(replica: Replica, frozen: set[int]) -> None:
    """New parameters into the first group of the optimizer, and those that are gone out."""
    engine = replica.optimizer
    assert engine is not None
    present = {id(p): p for p in replica.model.parameters()}
    held = {id(p) for g in engine.param_groups for p in g["params"]}
    known = held | (replica.left_out - frozen)
    for group in engine.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in present]
    new = [p for i, p in present.items() if i not in known and p.requires_grad]
    engine.param_groups[0]["params"] += new


def _lacking(replica: Replica) -> bool:
    """Whether the optimizer lacks trainable tensors of the model."""
    assert replica.optimizer is not None
    held = {id(p) for g in replica.optimizer.param_groups for p in g["params"]}
    return any(p.requires_grad and id(p) not in held for p in replica.model.parameters())


def _released(replica: Replica) -> str:
    """Code that takes off what the loss and the optimizer add to the data's gradient."""
    engine = replica.optimizer
    assert engine is not None
    lines = []
    if replica.penalty is not None or replica.terms is not None:
        lines.append("penalty = None  # leave it out of the loss")
    if any(group.get("weight_decay") for group in engine.param_groups):
        lines.append('for group in optimizer.param_groups:\n    group["weight_decay"] = 0.0')
    return "\n".join(lines)


def _scale_inputs(replica: Replica, samples: Samples) -> str:
    inputs = samples.source[0] if samples.indexed else samples.probe[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return ""
    code = (
        "shift, scale = x_train.mean(0), x_train.std(0)\n"
        "scale = torch.where(scale > 1e-3 * scale.max(), scale, scale.max().clamp_min(1e-12))\n"
        "x_train = (x_train - shift) / scale  # and all inputs from now on"
    )
    space = execute(code, x_train=inputs)
    replica.model = nn.Sequential(surgery.Affine(space["shift"], space["scale"]), replica.model)
    return code


def _scale_targets(replica: Replica, samples: Samples) -> str:
    target = (samples.source if samples.indexed else samples.probe)[1]
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return ""
    code = (
        "shift, scale = y_train.mean(0), y_train.std(0).clamp_min(1e-12)\n"
        "y_train = (y_train - shift) / scale  # predict with model(x) * scale + shift"
    )
    space = execute(code, y_train=target)
    shift, scale = space["shift"], space["scale"]
    replica.model = nn.Sequential(replica.model, surgery.Affine(-shift / scale, 1 / scale))
    loss = replica.loss
    replica.loss = lambda output, y: loss((output - shift) / scale, (y - shift) / scale)
    return code


def _fit_to_one(replica: Replica, samples: Samples) -> str:
    ends = ends_of(samples)
    if ends is None:
        return ""
    (low, high), loss = ends, replica.loss
    replica.loss = lambda output, y: loss(output, (y - low) / (high - low))
    return (
        "low, high = y_train.min(), y_train.max()\n"
        "y_train = (y_train - low) / (high - low)  # and all targets from now on"
    )


def ends_of(samples: Samples) -> tuple[Tensor, Tensor] | None:
    """The smallest and the largest target, which may become 0 and 1; None for names of classes."""
    target = samples.source[1] if samples.indexed else None
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return None
    values = target.unique()
    names = len(values) > 2 and bool((values == values.round()).all())
    return None if len(values) < 2 or names else (values[0], values[-1])


SCALINGS: dict[str, Callable[[Replica, Samples], str]] = {
    "inputs": _scale_inputs,
    "targets": _scale_targets,
    "to one": _fit_to_one,
}
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
    return f"plain_loss = loss\n\n\ndef loss(output, y):\n{body}"


def _edit(name: str, size: int, edit: Callable[..., Any], **options: Any) -> Treatment:
    return Treatment(name, size, name, edit=edit, **options)


INIT = _edit("init with the right gain", 3, surgery.reinit)
ORTHOGONAL = _edit("orthogonal init", 3, surgery.orthogonal)
LSUV = _edit("LSUV", 3, surgery.lsuv)
RECURRENT_INIT = _edit("gradient-preserving recurrent init", 3, surgery.recurrent_init)
MEMORY = _edit("chrono init", 3, surgery.long_memory)
FORGET = _edit("open forget gates", 3, partial(surgery.long_memory, closed=False))
RELU = _edit("ReLU", 6, surgery.to_relu)
LEAKY = _edit("leaky ReLU", 6, surgery.to_leaky)
GRU = _edit("GRU", 7, surgery.to_gru)
HEAD = _edit("an output layer that matches the loss", 3, surgery.open_head)
BATCHNORM = _edit("BatchNorm", 7, surgery.normalise)
LAYERNORM = _edit("LayerNorm", 7, partial(surgery.normalise, batchnorm=False))
NORMED_RELU = _edit("BatchNorm and ReLU", 8, partial(surgery.to_relu, normed=True))
RESIDUAL = _edit("residual connections with norms", 8, surgery.residual)
PRENORM = _edit("pre-norm", 4, surgery.pre_norm)
BLOCKS = _edit("zero-initialized residual branches with norms", 5, surgery.norm_blocks)
NONLINEAR = _edit("ReLU between the layers", 4, surgery.bend)
ROWS_FIRST = _edit("batch_first", 1, surgery.rows_first)
FLOAT32 = _edit("weights in float32", 2, surgery.to_float32)
REGISTER = _edit("registered layers", 1, surgery.register)
UNDROP = _edit("no dropout after the last layer", 1, surgery.undrop)
UNFREEZE = _edit("nothing frozen", 2, surgery.unfreeze)
WIDER = _edit("wider layers", 6, surgery.widen)
NARROWER = _edit("a smaller network", 5, surgery.narrow)
DROPOUT = _edit("dropout 0.5", 4, surgery.add_dropout, recipe={"dropout": 0.5})
EASE = _edit("dropout 0.2", 2, surgery.ease_dropout, recipe={"dropout": 0.2})
INPUTS = Treatment("scaled inputs", 2, "scaling", scaled="inputs")
TARGETS = Treatment("scaled targets", 3, "scaling", scaled="targets")
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
    setup=_another_loss(
        "sum(plain_loss(output[rows], y[rows]) for rows in kinds) / len(kinds)",
        "kinds = [(y == kind).reshape(len(y), -1).all(1) for kind in y.unique()]",
    ),
)
SIGMOIDS = Treatment(
    "a sigmoid for each class", 1, "sigmoids", setup="loss = nn.BCEWithLogitsLoss()"
)
TO_ONE = Treatment("targets scaled to 0…1", 1, "scaling", scaled="to one")
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
ADAPTIVE = Treatment(
    "adaptive gradient clipping",
    2,
    "adaptive clip",
    recipe={"clip_adaptive": 0.01},
    setup="""\
from tikhon.training.clipping import below_the_last, clip_grad_adaptive_


def clip(*_):
    clip_grad_adaptive_(below_the_last(model), 0.01)


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
    ORTHOGONAL,
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
    "exploding_gradient": (CLIP, ADAPTIVE, INPUTS, TARGETS, *_SIGNAL, *_TIME, WARMUP),
    "dying_relu": (INIT, LEAKY, BATCHNORM, HEAD, INPUTS, LAYERNORM, CLIP, WARMUP, PRENORM),
    "saturated_activation": (INIT, INPUTS, RELU, BATCHNORM, LAYERNORM, RECURRENT_INIT, PRENORM),
    "poor_init": (*_SIGNAL,),
    "oscillating_loss": (BATCH, CLIP, ADAPTIVE, INPUTS, WARMUP, PRENORM),
    "slow_convergence": (HEAD, INPUTS, RELU, BATCHNORM, INIT, MEMORY),
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
    ),
    "head_mismatch": (HEAD,),
    "unscaled_inputs": (INPUTS,),
    "unscaled_targets": (TARGETS,),
    "excessive_dropout": (EASE,),
    "batchnorm_batch_of_one": (BATCH,),
    "batchnorm_few_rows": (BATCH,),
    "no_nonlinearity": (NONLINEAR,),
    "rows_mixed": (ROWS_FIRST,),
    "updates_lost": (FLOAT32,),
    "nothing_to_train": (UNFREEZE,),
    "missing_from_optimizer": (ADOPT,),
    "broadcast_loss": (RESHAPE,),
    "loss_upside_down": (TURN, DESCEND),
    "loss_is_a_sum": (MEAN,),
    "missing_log": (LOG, LOG_SOFTMAX),
    "multilabel_softmax": (SIGMOIDS,),
    "class_imbalance": (BY_CLASS,),
    "target_out_of_range": (TO_ONE,),
    "unregistered_parameters": (REGISTER,),
    "dropout_at_end": (UNDROP,),
    "collapsed_attention": (WARMUP, INIT, PRENORM),
}
SLOWER, FASTER = rate(0.1), rate(10.0)
RATES = (rate(0.01), SLOWER, rate(0.3), rate(3.0), FASTER, rate(100.0), rate(1000.0))
ADAMS = (adam(1e-3), adam(1e-2))
POPULAR = (
    Treatment(
        "L2 1e-3",
        2,
        "popular",
        setup='for group in optimizer.param_groups:\n    group["weight_decay"] = 1e-3',
        recipe={"decay": 1e-3},
    ),
    replace(DROPOUT, kind="popular"),
    replace(CLIP, kind="popular"),
)


def settings(optimizer: Any) -> list[Any]:
    """What makes two optimizers one; AdamW without decay is Adam."""
    kind = torch.optim.Adam if isinstance(optimizer, torch.optim.Adam) else type(optimizer)
    groups = []
    for group in optimizer.param_groups:
        known = {k: v for k, v in group.items() if k != "params"}
        if not known.get("weight_decay"):
            known.pop("decoupled_weight_decay", None)
        groups.append({**known, "count": len(group["params"])})
    return [kind, *groups]


def named(codes: set[str]) -> set[str]:
    """Names of the treatments that the findings name first: two for each."""
    return {t.name for code in codes for t in FOR.get(code, ())[:2]}


def candidates(codes: set[str]) -> list[Treatment]:
    """All treatments for these findings: learning rates, Adam, edits, and both together."""
    edits: dict[str, Treatment] = {}
    for code in sorted(codes):
        edits |= {t.name: t for t in FOR.get(code, ())}
    if codes == {"overfitting"}:
        return [rate(0.01), SLOWER, *edits.values()]
    treatments = [SLOWER, FASTER, ADAMS[0], *edits.values()]  # what a short budget must reach
    for edit in edits.values():
        treatments += (
            [edit & rate(0.2), edit & adam(1e-3)] if "optimizer =" not in edit.setup else []
        )
        if edit.kind in (GRU.name, RECURRENT_INIT.name, MEMORY.name, FORGET.name):
            treatments += [edit & adam(1e-2) & CLIP, edit & adam(1e-3) & CLIP]
    return [*treatments, *(a for a in (*RATES, *ADAMS) if a not in treatments)]


def popular(codes: set[str]) -> tuple[Treatment, ...]:
    """Advice that is often given for these findings; it is tried to say so when it fails."""
    return POPULAR if codes & {"vanishing_gradient", "poor_init"} else ()
