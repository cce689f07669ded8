"""Pairs of programs, wrong and right, and the treatment that makes one the other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from faulty import classes
from tikhon.cures import treatments as cures
from tikhon.cures.treatment import Treatment
from wired import Fn, looking, mlp, short_sentences

CE = F.cross_entropy


@dataclass(frozen=True)
class Twins:
    """A wrong and a right program: models are drawn with one seed, losses may differ too.

    `harmless` treatments change nothing in the right program, or do not apply to it.
    """

    name: str
    treatment: Treatment
    wrong: Callable[[], nn.Module]
    right: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: Callable[..., Any] = CE
    right_loss: Callable[..., Any] | None = None
    harmless: bool = True


def steps(rows=20, time=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, time, 5, generator=generator), torch.arange(rows) % 3


def tokens(rows=20, time=7, words=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, words, (rows, time), generator=generator)
    x[::2, 5:] = 0
    return x, x


def amounts():
    x, _ = classes()
    return x, x[:, 0] * x[:, 1]


def chances():
    x, _ = classes()
    return x, x[:, :4].softmax(1)


def by_place(output, target):
    return CE(output.transpose(1, 2), target)


def gru(flip):
    def run(m, x):
        state = m.core(x)[1]
        state = state.transpose(0, 1).reshape(len(x), -1) if flip else state.view(len(x), -1)
        return m.head(state)

    return lambda: Fn(
        run, core=nn.GRU(5, 8, batch_first=True, bidirectional=True), head=nn.Linear(16, 3)
    )


def pooled(axis, own=False):
    def run(m, x):
        words = m.up(x)
        scores = words @ words.transpose(1, 2) if own else m.rate(words)
        weights = F.softmax(scores, dim=axis)
        return m.head((weights @ words if own else weights * words).sum(1))

    return lambda: Fn(run, up=nn.Linear(5, 8), rate=nn.Linear(8, 1), head=nn.Linear(8, 3))


def cut(how):
    def run(m, x):
        if how == "no_grad":
            with torch.no_grad():
                hidden = torch.relu(m.body(x))
        else:
            hidden = torch.relu(m.body(x))
            hidden = getattr(hidden, how)() if how == "detach" else hidden
            hidden = hidden.data if how == "data" else hidden
        return m.head(hidden)

    return lambda: Fn(run, body=nn.Linear(16, 8), head=nn.Linear(8, 4))


def dropped(always):
    def run(m, x):
        return m.head(F.dropout(m.body(x), 0.5, training=always or m.training))

    return lambda: Fn(run, body=nn.Linear(16, 8), head=nn.Linear(8, 4))


def squashed(last):
    return lambda: Fn(lambda m, x: last(m.net(x)), net=mlp())


def attention(kind, masked):
    def run(m, x):
        words = m.words(x)
        late = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if kind == "layer":
            words = m.mix(words, src_mask=late if masked else None)
        elif kind == "dot":
            words = F.scaled_dot_product_attention(words, words, words, is_causal=masked)
        elif kind == "convolution":
            pad = (2, 0) if masked else (1, 1)
            words = F.conv1d(F.pad(words.mT, pad), m.kernel).mT
        else:
            scores = words @ words.mT
            scores = scores.masked_fill(late, -math.inf) if masked else scores
            words = scores.softmax(-1) @ words
        return m.head(words)

    def build():
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        model = Fn(run, words=nn.Embedding(6, 8), mix=layer, head=nn.Linear(8, 6))
        model.kernel = nn.Parameter(torch.randn(8, 8, 3))
        if kind == "convolution" and not masked:
            model._run = lambda m, x: m.head(F.conv1d(m.words(x).mT, m.kernel, padding=1).mT)
        return model

    return build


def hidden(kind, right):
    def run(m, x):
        words, there = m.words(x), x > 0
        if kind == "dot":
            mask = (there if right else ~there)[:, None, :]
            found = F.scaled_dot_product_attention(words, words, words, mask)
        else:
            scores = words @ words.mT
            if kind == "queries":
                hide = ~there[:, None, :] if right else ~there[:, :, None]
            else:
                hide = (~there if right else there)[:, None, :]
            found = scores.masked_fill(hide, -1e4).softmax(-1) @ words
        return m.head(found)

    return lambda: Fn(run, words=nn.Embedding(6, 8), head=nn.Linear(8, 6))


def sentence(kind, right):
    """A reader of padded sentences: its words are what is not 0."""

    def run(m, x):
        words, hide = m.words(x), x == 0
        if kind == "attention":
            words = m.mix(words, src_key_padding_mask=hide if right else None)
            return m.head(words[:, 0])
        if kind == "weights":
            scores = m.rate(words)[..., 0]
            scores = scores.masked_fill(hide, -1e9) if right else scores
            return m.head((scores.softmax(1)[..., None] * words).sum(1))
        if kind == "last":
            last = (~hide).sum(1) - 1
            return m.head(words[torch.arange(len(x)), last] if right else words[:, -1])
        if kind == "state":
            ends = (~hide).sum(1)
            if right:
                words = nn.utils.rnn.pack_padded_sequence(words, ends, True, enforce_sorted=False)
            return m.end(m.core(words)[1][0].transpose(0, 1).flatten(1))
        if kind == "largest":
            far = (-words).masked_fill(hide[..., None], -1e9) if right else -words
            return m.head(far.max(1).values)
        there = (~hide)[..., None]
        return m.head((words * there).sum(1) / there.sum(1) if right else words.mean(1))

    return lambda: Fn(
        run, words=nn.Embedding(6, 8), rate=nn.Linear(8, 1), head=nn.Linear(8, 3),
        mix=nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        core=nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True), end=nn.Linear(16, 3),
    )  # fmt: skip


def centred(right, scale=False):
    def run(m, x):
        up = m.up(x)
        if scale:
            return m.head(F.normalize(up, dim=-1 if right else 0))
        return m.head(up - (up.mean(1, keepdim=True) if right else up.mean()))

    return lambda: Fn(run, up=nn.Linear(16, 8), head=nn.Linear(8, 4))


def octaves(unit):
    return lambda: Fn(lambda m, x: m.head((unit * x).sin()), head=nn.Linear(16, 4))


def lone(squash):
    return lambda: Fn(lambda m, x: squash(m.up(x)), up=nn.Linear(16, 1))


def pulled(wrong):
    def loss(model, batch):
        x, y = batch
        best = model(x.roll(1, 0)).max(1).values
        return F.mse_loss(model(x)[:, 0], y + 0.5 * (best if wrong else best.detach()))

    return loss


def by_class(output, y):
    counts = y.flatten().bincount(minlength=6).clamp_min(1)
    return by_place_of(CE, y.numel() / (6 * counts))(output, y)


def by_place_of(loss, weight):
    return lambda output, y: loss(output.transpose(1, 2), y, weight=weight)


def two_ways(right):
    def run(m, x):
        found = m.core(m.words(x))[0]
        if right:
            found = torch.cat([found[..., :8], 0 * found[..., 8:]], -1)
        return m.head(found)

    return lambda: Fn(
        run, words=nn.Embedding(6, 8), head=nn.Linear(16, 6),
        core=nn.GRU(8, 8, batch_first=True, bidirectional=True),
    )  # fmt: skip


def timed(first):
    return lambda: Fn(
        lambda m, x: m.head(m.core(x.transpose(0, 1))[0][-1]),
        core=nn.LSTM(5, 8, batch_first=first), head=nn.Linear(8, 3),
    )  # fmt: skip


def shared(own):
    def build():
        part = nn.Linear(8, 8)
        layers = nn.ModuleList([part, copy.deepcopy(part) if own else part])
        run = lambda m, x: m.head(m.parts[0](x[:, :8]) + m.parts[1](x[:, 8:]))  # noqa: E731
        return Fn(run, parts=layers, head=nn.Linear(8, 4))

    return build


def chain(*middle):
    return lambda: nn.Sequential(nn.Linear(16, 32), *copy.deepcopy(middle), nn.Linear(32, 4))


def late(wrong):
    def loss(output, y):
        chosen = -output.log_softmax(1)[torch.arange(len(y)), y]
        weight = torch.arange(len(y)).float()
        return ((chosen.mean() if wrong else chosen) * weight).sum() / len(y)

    return loss


def entries(reduce):
    def loss(output, y):
        rows = F.binary_cross_entropy_with_logits(output, y, reduction="none")
        return getattr(rows, reduce)(1).mean() + output.square().mean()

    return loss


def weighed(output, y):
    share = y.mean(0).clamp(0.02, 0.98)
    return F.binary_cross_entropy_with_logits(output, y, pos_weight=(1 - share) / share)


def shift(more):
    def loss(output, y):
        return by_place(output[:, : -1 - more], y[:, 1 + more :])

    return loss


def reader():
    return Fn(lambda m, x: m.head(m.words(x)), words=nn.Embedding(6, 8), head=nn.Linear(8, 6))


def without(square):
    def loss(model, batch):
        with torch.no_grad():
            value = CE(model(batch[0]), batch[1])
        value.requires_grad_()
        return value

    return loss if square else (lambda model, batch: CE(model(batch[0]), batch[1]))


one = lambda: mlp(16, 1)  # noqa: E731
net = mlp
TWINS = [
    Twins("states of two directions", cures.AXES_IN_ORDER, gru(False), gru(True), steps),
    Twins("softmax over rows", cures.SOFTMAX_OVER_AXIS_1, pooled(0), pooled(1), steps),
    Twins("attention over rows", cures.SOFTMAX_OVER_LAST_AXIS, pooled(0, True), pooled(-1, True),
          steps),
    Twins("detached", cures.NOTHING_DETACHED, cut("detach"), cut(""), classes),
    Twins("data", cures.NOTHING_DETACHED, cut("data"), cut(""), classes),
    Twins("no_grad", cures.NOTHING_DETACHED, cut("no_grad"), cut(""), classes),
    Twins("told to require", cures.NOTHING_DETACHED, net, net, classes, without(True),
          without(False)),
    Twins("dropout in eval", cures.NO_NOISE_IN_EVAL, dropped(True), dropped(False), classes),
    Twins("sigmoid behind", cures.NO_HEAD_ACTIVATION, squashed(torch.sigmoid), net, classes,
          harmless=False),
    Twins("sigmoid in the loss", cures.NO_HEAD_ACTIVATION, one, one, chances,
          lambda o, y: F.binary_cross_entropy_with_logits(o.sigmoid(), y[:, :1]),
          lambda o, y: F.binary_cross_entropy_with_logits(o, y[:, :1])),
    Twins("ignored", cures.NO_IGNORED_CLASSES, net, net, classes,
          nn.CrossEntropyLoss(ignore_index=0), CE),
    Twins("weight 0", cures.NO_IGNORED_CLASSES, net, net, classes,
          nn.CrossEntropyLoss(torch.tensor([1.0, 0.0, 1.0, 1.0])), CE),
    Twins("broadcast inside", cures.ONE_SHAPE_IN_LOSS, one, one, amounts,
          lambda o, y: (o - y).square().mean(), lambda o, y: (o[:, 0] - y).square().mean()),
    Twins("logarithm of 0", cures.CLAMPED_FUNCTIONS, net, net, classes,
          lambda o, y: -torch.log(torch.relu(o[torch.arange(len(y)), y])).mean(),
          lambda o, y: -torch.log(torch.relu(o[torch.arange(len(y)), y]).clamp_min(1e-8)).mean()),
    Twins("root of 0", cures.CLAMPED_FUNCTIONS, net, net, classes,
          lambda o, y: (0 * o).square().sum(1).sqrt().mean() + CE(o, y),
          lambda o, y: (0 * o).square().sum(1).clamp_min(1e-8).sqrt().mean() + CE(o, y)),
    *(
        Twins(f"{kind} sees later", cures.CAUSAL_MASK, attention(kind, False), attention(kind,
              True),
              tokens, by_place, harmless=kind != "convolution")
        for kind in ("layer", "dot", "by hand", "convolution")
    ),
    Twins("both directions", cures.ONE_DIRECTION, two_ways(False), two_ways(True), tokens,
          by_place),
    Twins("time in front", cures.COLUMNS_FIRST, timed(True), timed(False), steps),
    Twins("exchanged", cures.SWAPPED_ARGUMENTS, net, net, chances,
          lambda o, y: F.binary_cross_entropy_with_logits(y, o),
          lambda o, y: F.binary_cross_entropy_with_logits(o, y)),
    Twins("probabilities in kl_div", cures.LOG_INSIDE_LOSS, net, net, chances,
          lambda o, y: F.kl_div(o.softmax(1), y, reduction="batchmean"),
          lambda o, y: F.kl_div(o.log_softmax(1), y, reduction="batchmean"), harmless=True),
    Twins("scores in nll", cures.LOG_INSIDE_LOSS, net, net, classes, F.nll_loss,
          lambda o, y: F.nll_loss(o.log_softmax(1), y)),
    Twins("mean before weights", cures.WEIGHTS_BEFORE_MEAN, net, net, classes, late(True),
          late(False)),
    Twins("means of entries", cures.SUM_OVER_ENTRIES, net, net, chances, entries("mean"),
          entries("sum")),
    Twins("padding in the loss", cures.NO_PADDING_IN_LOSS, reader, reader, tokens, by_place,
          lambda o, y: CE(o.transpose(1, 2), y, ignore_index=0)),
    *(
        Twins(f"padding in the {kind}", cures.NO_PADDING_IN_MODEL, sentence(kind, False),
              sentence(kind, True), lambda: (tokens()[0], steps()[1]), harmless=kind != "mean")
        for kind in ("attention", "weights", "last", "mean", "state", "largest")
    ),
    Twins("mask turned", cures.INVERTED_MASKS, hidden("dot", False), hidden("dot", True), tokens,
          by_place, harmless=False),
    Twins("fill turned", cures.INVERTED_MASKS, hidden("fill", False), hidden("fill", True), tokens,
          by_place, harmless=False),
    Twins("mask of queries", cures.KEY_MASKS, hidden("queries", False),
          hidden("queries", True), tokens, by_place),
    Twins("yes is rare", cures.POSITIVE_WEIGHTS, net, net, lambda: (classes()[0],
          chances()[1].round()),
          F.binary_cross_entropy_with_logits, weighed),
    Twins("one class is rare", cures.CLASS_WEIGHTS, reader, reader, tokens, by_place, by_class,
          harmless=False),
    Twins("mean of the batch", cures.ROW_STATISTICS, centred(False), centred(True), classes),
    Twins("unit length of columns", cures.ROW_STATISTICS, centred(False, True), centred(True,
          True),
          classes),
    Twins("octaves without pi", cures.COORDINATES_TIMES_PI, octaves(1), octaves(math.pi), classes,
          harmless=False),
    Twins("softmax of one unit", cures.SIGMOID_OF_ONE_UNIT, lone(lambda x: x.softmax(1)),
          lone(torch.sigmoid),
          lambda: (classes()[0], (amounts()[1][:, None] > 0).float()), F.binary_cross_entropy),
    Twins("a goal that is pulled", cures.DETACHED_GOALS, net, net, amounts, pulled(True),
          pulled(False)),
    Twins("shifted twice", cures.SHIFTED_BACK, reader, reader, tokens, shift(1),
          lambda o, y: by_place(o[:, :-2], y[:, 1:-1]), harmless=False),
    Twins("angles", cures.CIRCULAR_LOSS, one, one, amounts,
          lambda o, y: F.mse_loss(o[:, 0], y), lambda o, y: (1 - (o[:, 0] - y).cos()).mean()),
    Twins("one layer twice", cures.UNSHARED_LAYERS, shared(False), shared(True), classes),
    Twins("groups of one", cures.LARGER_GROUPS, chain(nn.GroupNorm(32, 32)),
          chain(nn.GroupNorm(8, 32)), classes),
    Twins("statistics stand still", cures.RUNNING_STATISTICS,
          chain(nn.BatchNorm1d(32, momentum=0.0)), chain(nn.BatchNorm1d(32)), classes),
    Twins("padding turned", cures.INVERTED_MASKS, partial(looking, "layer", False),
          partial(looking, "layer", True), short_sentences, harmless=False),
    Twins("no second derivative", cures.TANH, chain(nn.ReLU()), chain(nn.Tanh()), classes),
]  # fmt: skip


COVERED = {t.treatment.name for t in TWINS} | {
    t.name
    for t in (
        cures.POSITIONAL_ENCODING, cures.NO_TARGET_COLUMNS, cures.FILLED_GAPS, cures.FINITE_ROWS,
        cures.SHUFFLE, cures.NEXT_POSITION_TARGETS, cures.NO_GRADIENT_HOOKS,
        cures.INPUTS_REQUIRING_GRAD, cures.LAYERS_IN_INIT, cures.SHIFTED_DECODER_INPUT,
    )
}  # fmt: skip
