"""Treatments: named edits with their size and their patch, and which finding asks for which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.diagnosis import surgery
from tikhon.diagnosis.feed import Feed
from tikhon.diagnosis.replica import Replica


@dataclass(frozen=True)
class Treatment:
    """One change of a program.

    `size` orders edits from small (a number) to large (an architecture); `patch` is the change as
    PyTorch code; `edit` changes the model; the other fields change how it is trained.
    """

    name: str
    size: int
    patch: str
    edit: surgery.Edit | None = None
    lr: float = 1.0
    optimizer: tuple[str, float] | None = None
    warmup: int = 0
    clip: float | None = None
    batch: int | None = None
    decay: float | None = None
    free: bool = False  # without penalty and weight decay
    scale_inputs: bool = False
    scale_targets: bool = False
    stop_early: bool = False
    kind: str = ""

    def __and__(self, other: Treatment) -> Treatment:
        """Both treatments: the edit of the first, the training of the second."""
        changes: dict[str, Any] = {
            "name": f"{self.name} + {other.name}",
            "size": self.size + other.size,
            "patch": f"{self.patch}\n{other.patch}",
            "lr": self.lr * other.lr,
            "optimizer": other.optimizer or self.optimizer,
            "clip": other.clip or self.clip,
            "warmup": other.warmup or self.warmup,
            "batch": other.batch or self.batch,
        }
        return replace(self, **changes)

    def apply(self, replica: Replica, feed: Feed) -> Replica | None:
        """The treated replica, changed in place; None where the edit does not apply."""
        if self.edit is not None and not self.edit(replica.model, feed.probe):
            return None
        if self.scale_inputs and not _scale_inputs(replica, feed):
            return None
        if self.scale_targets and not _scale_targets(replica, feed):
            return None
        if self.free:
            replica.penalty = None
        self._rebuild(replica)
        replica.clip = self.clip or replica.clip
        return replica

    def _rebuild(self, replica: Replica) -> None:
        """The optimizer with the new parameters in and the old ones out."""
        engine = replica.optimizer
        assert engine is not None
        present = {id(p): p for p in replica.model.parameters()}
        held = {id(p) for g in engine.param_groups for p in g["params"]}
        for group in engine.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in present]
        new = [p for i, p in present.items() if i not in held and p.requires_grad]
        engine.param_groups[0]["params"] += new
        if self.optimizer is not None:
            name, lr = self.optimizer
            kept = [p for g in engine.param_groups for p in g["params"]]
            decay = self.decay if self.decay is not None else 0.0
            engine = getattr(torch.optim, name)(kept, lr=lr, weight_decay=decay)
        for group in engine.param_groups:
            group["lr"] = group["lr"] * self.lr
            if self.free:
                group["weight_decay"] = 0.0
            elif self.decay is not None:
                group["weight_decay"] = self.decay
        replica.optimizer = engine


def _scale_inputs(replica: Replica, feed: Feed) -> bool:
    inputs = feed.source[0] if feed.indexed else feed.probe[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return False
    shift = inputs.mean(0)
    spread = inputs.std(0)
    scale = torch.where(spread > 1e-3 * spread.max(), spread, spread.max().clamp_min(1e-12))
    replica.model = nn.Sequential(surgery.Affine(shift, scale), replica.model)
    return True


def _scale_targets(replica: Replica, feed: Feed) -> bool:
    target = (feed.source if feed.indexed else feed.probe)[1]
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return False
    shift, scale = target.mean(0), target.std(0).clamp_min(1e-12)
    replica.model = nn.Sequential(replica.model, surgery.Affine(-shift / scale, 1 / scale))
    loss = replica.loss
    replica.loss = lambda output, y: loss((output - shift) / scale, (y - shift) / scale)
    return True


NOTHING = Treatment("nothing", 0, "")


def rate(factor: float) -> Treatment:
    """The learning rate times a factor."""
    patch = f'for group in optimizer.param_groups:\n    group["lr"] *= {factor:g}'
    return Treatment(f"lr x{factor:g}", 1, patch, lr=factor, kind="lr")


def adam(lr: float) -> Treatment:
    """Adam at a learning rate, without weight decay."""
    patch = f"optimizer = torch.optim.Adam(model.parameters(), lr={lr:g})"
    return Treatment(f"Adam {lr:g}", 2, patch, optimizer=("Adam", lr), kind="adam")


def _edit(name: str, size: int, edit: Callable[..., bool], code: str) -> Treatment:
    return Treatment(name, size, code, edit=edit, kind=name)


_SURGERY = "from tikhon.diagnosis import surgery\n"
INIT = _edit(
    "init of the right gain", 3, surgery.reinit,
    "for layer in model.modules():\n"
    "    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):\n"
    '        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # tanh: xavier_normal_\n'
    "        nn.init.zeros_(layer.bias)\n"
    "    elif isinstance(layer, nn.MultiheadAttention):\n"
    "        nn.init.xavier_uniform_(layer.in_proj_weight)\n"
    "        nn.init.xavier_uniform_(layer.out_proj.weight)",
)  # fmt: skip
ORTHOGONAL = _edit(
    "orthogonal init", 3, surgery.orthogonal,
    "for layer in model.modules():\n"
    "    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):\n"
    "        nn.init.orthogonal_(layer.weight, gain=1.05)  # ReLU: 2 ** 0.5\n"
    "        nn.init.zeros_(layer.bias)",
)  # fmt: skip
LSUV = _edit("LSUV", 3, surgery.lsuv, _SURGERY + "surgery.lsuv(model, batch)")
RECURRENT_INIT = _edit(
    "gradient-preserving recurrent init", 3, surgery.recurrent_init,
    "for name, p in rnn.named_parameters():\n"
    '    if name.startswith("weight_hh"):\n'
    "        for gate in p.data.split(rnn.hidden_size):\n"
    "            nn.init.orthogonal_(gate)  # LSTM: also forget-gate bias 1",
)  # fmt: skip
RELU = _edit(
    "ReLU", 6, surgery.to_relu, "# nn.Sigmoid(), nn.Softmax(-1), ... -> nn.ReLU(), He init"
)
LEAKY = _edit("leaky ReLU", 6, surgery.to_leaky, "# nn.ReLU() -> nn.LeakyReLU(0.1)")
GRU = _edit("GRU", 7, surgery.to_gru, "# nn.RNN(...) -> nn.GRU(...) of the same sizes")
HEAD = _edit(
    "a head that fits the loss", 3, surgery.open_head,
    "# remove the activation behind the last layer (softmax over one unit: nn.Sigmoid())",
)  # fmt: skip
BATCHNORM = _edit(
    "BatchNorm", 7, surgery.normalise, "# nn.Linear(a, b) -> nn.Linear(a, b), nn.BatchNorm1d(b)"
)
LAYERNORM = _edit(
    "LayerNorm", 7, partial(surgery.normalise, batchnorm=False),
    "# nn.Linear(a, b) -> nn.Linear(a, b), nn.LayerNorm(b)",
)  # fmt: skip
RESIDUAL = _edit(
    "residual connections with LayerNorm", 8, surgery.residual,
    "# h = activation(layer(h)) -> h = h + layer(activation(norm(h))), norm before the head",
)  # fmt: skip
BLOCKS = _edit(
    "zero branches with LayerNorm", 5, surgery.norm_blocks,
    "for block in blocks:\n    nn.init.zeros_(block.last.weight)  # and LayerNorm at its start",
)  # fmt: skip
WIDER = _edit("wider layers", 6, surgery.widen, "# hidden widths of at least 64")
NARROWER = _edit("a smaller network", 5, surgery.narrow, "# hidden widths at an eighth")
DROPOUT = _edit("dropout 0.5", 4, surgery.add_dropout, "# nn.Dropout(0.5) behind each activation")
EASE = _edit("dropout 0.2", 2, surgery.ease_dropout, "# dropout rates of at most 0.2")
INPUTS = Treatment(
    "scaled inputs", 2, "x = (x - x_train.mean(0)) / x_train.std(0)", scale_inputs=True,
    kind="scaling",
)  # fmt: skip
TARGETS = Treatment(
    "scaled targets", 3, "y = (y - y_train.mean(0)) / y_train.std(0)", scale_targets=True,
    kind="scaling",
)  # fmt: skip
CLIP = Treatment(
    "clipping", 2, "nn.utils.clip_grad_norm_(model.parameters(), 1.0)", clip=1.0, kind="clip"
)
WARMUP = Treatment(
    "warm-up", 2, "scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 50)",
    warmup=50, kind="warmup",
)  # fmt: skip
FREE = Treatment(
    "no penalty", 2, "# loss without the penalty, optimizer with weight_decay=0", free=True,
    kind="penalty",
)  # fmt: skip
EARLY = Treatment(
    "early stopping", 2, "recipe = tikhon.Recipe(early_stopping=5)", stop_early=True, kind="early"
)
BATCH = Treatment("batches of 32", 2, "batch_size = 32", batch=32, kind="batch")


def decay(strength: float) -> Treatment:
    """AdamW with decoupled weight decay."""
    patch = (
        f"optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay={strength:g})"
    )
    return Treatment(
        f"weight decay {strength:g}", 3, patch, optimizer=("AdamW", 1e-3), decay=strength,
        kind="decay",
    )  # fmt: skip


_SIGNAL = (INIT, ORTHOGONAL, LSUV, RELU, BATCHNORM, LAYERNORM, RESIDUAL, BLOCKS)
_TIME = (RECURRENT_INIT, GRU, CLIP)
FOR: dict[str, tuple[Treatment, ...]] = {
    "vanishing_gradient": (*_SIGNAL, *_TIME, HEAD),
    "exploding_gradient": (CLIP, INPUTS, TARGETS, *_SIGNAL, *_TIME, WARMUP),
    "dying_relu": (INIT, LEAKY, BATCHNORM, HEAD, INPUTS, LAYERNORM, CLIP),
    "saturated_activation": (INIT, INPUTS, RELU, BATCHNORM, LAYERNORM, RECURRENT_INIT),
    "poor_init": (*_SIGNAL,),
    "oscillating_loss": (BATCH, CLIP, INPUTS),
    "slow_convergence": (HEAD, INPUTS, RELU, BATCHNORM, INIT),
    "overfitting": (DROPOUT, EARLY, decay(0.1), decay(1.0), NARROWER),
    "underfitting": (FREE, EASE, WIDER, BATCH, INIT, INPUTS),
    "head_mismatch": (HEAD,),
    "unscaled_inputs": (INPUTS,),
    "unscaled_targets": (TARGETS,),
    "excessive_dropout": (EASE,),
    "batchnorm_batch_of_one": (BATCH,),
    "collapsed_attention": (WARMUP, INIT),
}
RATES = tuple(rate(f) for f in (0.01, 0.1, 0.3, 3.0, 10.0, 100.0, 1000.0))
ADAMS = (adam(1e-3), adam(1e-2))
POPULAR = (
    Treatment("L2 1e-3", 2, "weight_decay=1e-3", decay=1e-3, kind="popular"),
    replace(DROPOUT, kind="popular"),
    replace(CLIP, kind="popular"),
)


def candidates(codes: set[str]) -> list[Treatment]:
    """All arms for these findings: learning rates, Adam, edits, and edits with another step."""
    edits: dict[str, Treatment] = {}
    for code in sorted(codes):
        edits |= {t.name: t for t in FOR.get(code, ())}
    arms = [*RATES, *ADAMS, *edits.values()]
    if codes == {"overfitting"}:
        return [*RATES[:2], *edits.values()]
    for edit in edits.values():
        if edit.optimizer is None:
            arms += [edit & rate(0.2), edit & adam(1e-3)]
            if edit.kind in ("GRU", RECURRENT_INIT.name):
                arms.append(edit & adam(1e-2) & CLIP)
    return arms


def popular(codes: set[str]) -> tuple[Treatment, ...]:
    """Advice that is often given for these findings; it is tried to say so when it fails."""
    return POPULAR if codes & {"vanishing_gradient", "poor_init"} else ()
