"""Findings about how a program is wired: graph, loss, rows, positions, structure.

Pure functions of the evidence; standard library only. What is measured: `tikhon.diagnosis.wiring`.
The data have a file of their own, `signal.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.causes import called
from tikhon.diagnosis.evidence import Evidence, middle, number
from tikhon.diagnosis.findings import Finding

CUT_FIXES = {
    "detach": "leave out .detach()",
    "data": "write x instead of x.data",
    "no_grad": "call it outside of torch.no_grad()",
    "argmax": "give the loss the scores themselves, not their argmax",
    "item": "keep the tensor: leave out .item()",
    "__float__": "keep the tensor: leave out float(...)",
    "tolist": "keep the tensor: leave out .tolist()",
    "numpy": "keep the tensor: use torch's functions in place of numpy's",
    "tensor": "keep the tensor: leave out torch.tensor(...)",
    "round": "leave out the rounding in training",
    "long": "leave out .long() on what is to be learned",
    "int": "leave out .int() on what is to be learned",
}
REGRESSIONS = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"}
BINARY = {"binary_cross_entropy", "binary_cross_entropy_with_logits"}
SIGNED = {"soft_margin_loss", "hinge_embedding_loss"}
ENTROPIES = {"cross_entropy", "log_softmax", "softmax"}


def miswired(ev: Evidence) -> list[Finding]:
    """The findings of the wiring tests, causes before what follows from them."""
    checks = (
        _graph,
        _detached,
        _broadcast,
        _upside_down,
        _rows,
        _future,
        _positions,
        _domain,
        _kind_of_loss,
        _operation,
        _straight,
        _order,
        _padding,
        _random,
        _few_rows,
        _short_floats,
        _shared,
    )
    return [finding for check in checks for finding in check(ev)]


def facts(ev: Evidence) -> dict[str, Any]:
    """What the wiring tests measured; a test that could not run leaves nothing."""
    return ev.record.wiring


def sizes(shape: Iterable[int], rows: int) -> str:
    """A shape with n in the place of the rows."""
    inner = ["n" if s == rows else str(s) for s in shape]
    return f"({', '.join(inner)}{',' if len(inner) == 1 else ''})"


def _graph(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    cuts = w.get("cuts") or []
    if w.get("connected") is False and ev.record.trainable and not w.get("detached"):
        name = cuts[0]["name"] if cuts else ""
        place = cuts[0]["place"] if cuts else ""
        where = (place,) if place else ()
        why = "no parameter has a path to the loss: backward() would change nothing"
        if cuts:
            why = f"{name} cuts every path from the parameters to the loss, at {place}"
        yield Finding(
            "loss_not_connected",
            "critical",
            where,
            {"parameters": float(ev.record.trainable)},
            why,
            fix=CUT_FIXES.get(name, "compute the loss from the model's output with torch"),
        )
    loose = list(w.get("unregistered") or [])
    if loose:
        count = len(loose)
        why = (
            f"{count} trainable tensor(s) take part in the loss but model.parameters() does not "
            "know them, so an optimizer made of it leaves them as they are"
        )
        yield Finding(
            "unregistered_parameters",
            "critical",
            tuple(loose),
            {"parameters": float(count)},
            why,
            fix=registered(loose[0]),
        )
    if w.get("made_in_forward"):
        made = float(w["made_in_forward"])
        where = (w["made_place"],) if w.get("made_place") else ()
        why = f"{made:.0f} trainable tensor(s) are created again in every forward pass"
        yield Finding(
            "layers_made_in_forward",
            "critical",
            where,
            {"made": made},
            why,
            fix="make the layer once in __init__: self.layer = ..., and call self.layer(x)",
        )


def registered(name: str) -> str:
    """The line that makes a module know a tensor that hangs on it under `name`.

    >>> registered("blocks[0].weight")
    'self.blocks = nn.ModuleList(self.blocks)'
    """
    owner, bracket, rest = name.partition("[")
    attribute = owner.rpartition(".")[2]
    if not bracket:
        return f"self.{attribute} = nn.Parameter(self.{attribute})"
    kind = "Module" if "." in rest else "Parameter"
    return (
        f"self.{attribute} = nn.{kind}{'Dict' if rest[:1] in QUOTES else 'List'}(self.{attribute})"
    )


QUOTES = ("'", '"')


def _detached(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    lost = tuple(w.get("detached") or ())
    if not lost:
        return
    cuts = w.get("cuts") or []
    name = cuts[0]["name"] if cuts else "detach"
    place = cuts[0]["place"] if cuts else "forward"
    spared = set(ev.record.static.get("unoptimized") or ())
    meant = set(lost) <= spared  # a part that is not trained is often cut on purpose
    why = (
        f"{len(lost)} trainable parameter(s) have no gradient because of {name} at {place}; "
        "without it they have one"
    )
    yield Finding(
        "detached",
        "info" if meant else "critical",
        lost,
        {"parameters": float(len(lost))},
        why,
        fix=f"{CUT_FIXES.get(name, 'leave it out')}; or requires_grad_(False) if they are to stay",
    )


def _broadcast(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    pull = number(w.get("pull_on_others"))
    if pull is None or pull < e.PULL:
        return
    spread = w.get("broadcast")
    output, target = w.get("output_shape"), w.get("target_shape")
    numbers = {"pull_on_others": pull}
    if spread:
        a, b = (sizes(s, w["rows"]) for s in spread["shapes"])
        where = (spread["place"] or "the loss",)
        why = (
            f"{spread['function']} gets shapes {a} and {b}: they broadcast, and every target "
            "pulls at every row"
        )
        yield Finding(
            "broadcast_loss",
            "critical",
            where,
            numbers,
            why,
            fix="loss(output, target.view_as(output))"
            if output != target
            else "give both one shape: .squeeze(-1) on neither, or on both",
        )
    else:
        why = "the target of one row changes the gradient of all rows, as in contrastive losses"
        yield Finding("loss_mixes_rows", "info", ("the loss",), numbers, why)


def _upside_down(ev: Evidence) -> Iterable[Finding]:
    away = number(facts(ev).get("pulls_away"))
    pull = number(facts(ev).get("pull_on_others")) or 0.0
    if away is None or away < 1 or pull >= e.PULL:
        return
    why = "a higher target pulls its output down, in every row that was tried: the loss is least "
    yield Finding(
        "loss_upside_down",
        "critical",
        ("the loss",),
        {"pulls_away": away},
        why + "where the answers are wrong",
        fix="loss = -loss, or 1 - loss where it is a share that is right",
    )


def _rows(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    apart = number(w.get("rows_apart")) or 0.0
    softmax = w.get("softmax_over_rows")
    if apart < e.APART and not softmax:
        return
    place = w.get("rows_place") or {}
    module, kind = place.get("module", ""), place.get("kind", "")
    numbers = {"rows_apart": apart}
    where = (module,) if module else ()
    if softmax:
        where = (softmax,)
        why = f"a softmax runs over the rows of the batch, at {softmax}"
        fix = "softmax(x, dim=1), or dim=-1: the axis of the classes"
    elif kind in ("LSTM", "GRU", "RNN") or "Transformer" in kind or "Attention" in kind:
        why = f"{called(module)} ({kind}) takes the first axis, the rows, for the time"
        fix = f"nn.{kind}(..., batch_first=True)"
    elif "BatchNorm" in kind:
        why = f"{called(module)} ({kind}) uses the statistics of the batch in evaluation mode too"
        fix = "track_running_stats=True; F.batch_norm(..., training=self.training)"
    elif module:
        why = f"{called(module)} ({kind}) mixes the rows of a batch"
        fix = "keep the axis of the rows, 0, out of sums, views and norms"
    else:
        behind = place.get("after") or "the inputs"
        why = f"rows of a batch are mixed behind {behind}, by a view, a sum or a transpose"
        where = tuple(v for v in (place.get("after"), place.get("before")) if v)
        fix = "x.transpose(0, 1) or x[-1] where .view(n, ...) moves the axis of the rows"
    why += f"; an answer changes by {apart:.0%} with its neighbours" if apart >= e.APART else ""
    yield Finding("rows_mixed", "critical", where, numbers, why, fix=fix)


def _future(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    apart = number(w.get("future_apart")) or 0.0
    if apart < e.APART:
        return
    why = (
        f"the target of a position is the next input, and answers change by {apart:.0%} when only "
        "later inputs change: the network reads off what it is to predict"
    )
    both = any(s.kind.startswith(("LSTM", "GRU", "RNN")) for s in ev.record.sites)
    fix = (
        "bidirectional=False"
        if both
        else ("mask = nn.Transformer.generate_square_subsequent_mask(T) in every attention")
    )
    yield Finding("future_visible", "critical", (), {"future_apart": apart}, why, fix=fix)


def _positions(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    change = w.get("reshape")
    elsewhere = number(w.get("answers_elsewhere")) or 0.0
    if not change and not w.get("positions_slip") and elsewhere <= 0.5:
        return
    if change:
        before, after = (sizes(change[k], w["rows"]) for k in ("from", "to"))
        axes = order_of(change["from"], change["to"])
        where = (change["place"],)
        why = f"a reshape from {before} to {after} keeps the order in memory: it mixes the axes"
        fix = f".permute({', '.join(map(str, axes))}) in place of the view" if axes else ".permute"
    else:
        where = ("the loss",)
        why = "the target of one position pulls at the outputs of others: axes are mixed up"
        if elsewhere > 0.5:
            why = "the target of one row pulls at the output of another: axes are mixed up"
        fix = "output.transpose(1, 2) of (n, time, classes); loss on output.flatten(0, 1)"
    yield Finding("positions_mixed", "critical", where, {}, why, fix=fix)


def order_of(before: list[int], after: list[int]) -> list[int]:
    """The permutation that gives one shape from another; empty where sizes repeat or differ.

    >>> order_of([8, 5, 3], [8, 3, 5])
    [0, 2, 1]
    """
    if sorted(before) != sorted(after) or len(set(before)) != len(before):
        return []
    return [before.index(size) for size in after]


def _domain(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    used = set(w.get("loss_functions") or ())
    low, high = number(w.get("target_low")), number(w.get("target_high"))
    if low is None or high is None:
        return
    numbers = {"target_low": low, "target_high": high}
    if used & BINARY and (low < 0 or high > 1):
        why = (
            f"binary cross-entropy is for targets from 0 to 1, these go from {low:.3g} to "
            f"{high:.3g}: the loss has no lower end"
        )
        fix = (
            "target = (target + 1) / 2"
            if (low, high) == (-1, 1)
            else (
                "nn.CrossEntropyLoss() for more classes than two"
                if w.get("target_whole")
                else "target = (target - low) / (high - low)"
            )
        )
        yield Finding("target_out_of_range", "critical", ("target",), numbers, why, fix=fix)
    below = number(w.get("below_zero"))
    if below is not None and not used & BINARY and (low < 0 or high > 1):
        why = (
            f"the loss is one of yes and no, for targets from 0 to 1; these go from {low:.3g} to "
            f"{high:.3g}, where it falls to {below:.3g}"
        )
        fix = "F.cross_entropy of one output a class" if w.get("target_whole") else "(y - low) / (high - low)"
        numbers |= {"loss": below}
        yield Finding("target_out_of_range", "critical", ("target",), numbers, why, fix=fix)
    if used & SIGNED and low >= 0 and w.get("target_values") == 2:
        why = (
            f"{sorted(used & SIGNED)[0]} is for targets -1 and 1, these are {low:.3g}, {high:.3g}"
        )
        fix = "target = 2 * target - 1"
        yield Finding("target_out_of_range", "critical", ("target",), numbers, why, fix=fix)
    gap = number(w.get("log_probabilities"))
    logs = used & {"nll_loss", "kl_div"}
    if logs and not used & {"log_softmax", "log"} and gap is not None and gap > 1e-3:
        why = f"{sorted(logs)[0]} is for log-probabilities, and these outputs are none"
        fix = "F.log_softmax(output, dim=1) before it; or nn.CrossEntropyLoss() of the scores"
        yield Finding("missing_log", "critical", ("the loss",), {"log_sum": gap}, why, fix=fix)


def _kind_of_loss(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    used = set(w.get("loss_functions") or ())
    most = number((w.get("target_sums") or [0, 0])[1]) or 0.0
    if used & ENTROPIES and not used & BINARY and most > 1.01:
        why = (
            f"rows have up to {most:.0f} classes at once, and a softmax gives one only: its "
            "probabilities add up to 1"
        )
        yield Finding(
            "multilabel_softmax",
            "warning",
            ("the loss",),
            {"ones_in_a_row": most},
            why,
            fix="nn.BCEWithLogitsLoss() on the scores",
        )
    gain = number(w.get("class_gain"))
    one = w.get("output_shape") in ([], [1])
    if used & REGRESSIONS and one and gain is not None and gain > e.BY_CLASS:
        values = int(w.get("target_values") or 0)
        why = (
            f"the targets are {values} class numbers regressed as amounts; taken as classes, a "
            f"shallow model is right {gain:.0%} more often"
        )
        fix = f"nn.Linear(..., {values}) as the head, nn.CrossEntropyLoss(), target.long()"
        yield Finding(
            "classes_as_numbers", "warning", ("the loss",), {"class_gain": gain}, why, fix=fix
        )
    silent = w.get("silent_classes") or []
    if silent:
        named = ", ".join(map(str, silent[:5]))
        why = f"rows of class {named} send no gradient: ignore_index, or a weight of zero"
        numbers = {"silent_classes": float(len(silent))}
        yield Finding(
            "ignored_rows",
            "warning",
            ("the loss",),
            numbers,
            why,
            fix="another ignore_index (torch's own is -100), weights above 0",
        )


OPERATIONS = {
    "log": "torch.log(x.clamp_min(1e-8)); or log_softmax, logsigmoid, a loss on the scores",
    "log2": "torch.log2(x.clamp_min(1e-8))",
    "log10": "torch.log10(x.clamp_min(1e-8))",
    "log1p": "torch.log1p(x.clamp_min(-1 + 1e-6))",
    "sqrt": "torch.sqrt(x + 1e-8): its slope at 0 is infinite",
    "rsqrt": "torch.rsqrt(x + 1e-8)",
    "div": "x / (y + 1e-8)",
    "true_divide": "x / (y + 1e-8)",
    "__truediv__": "x / (y + 1e-8)",
    "__rtruediv__": "x / (y + 1e-8)",
    "reciprocal": "1 / (x + 1e-8)",
    "pow": "(x + 1e-8) ** p",
    "__pow__": "(x + 1e-8) ** p",
    "norm": "torch.sqrt((x ** 2).sum() + 1e-8): the slope of a norm at 0 has no value",
    "acos": "x.clamp(-1 + 1e-6, 1 - 1e-6)",
    "asin": "x.clamp(-1 + 1e-6, 1 - 1e-6)",
    "std": "torch.sqrt(x.var() + 1e-8)",
}


def _operation(ev: Evidence) -> Iterable[Finding]:
    failure = ev.record.failure
    if failure is None or failure.call not in OPERATIONS:
        return
    smallest = number(failure.smallest)
    numbers = {"step": float(failure.step)} | (
        {"smallest": smallest} if smallest is not None else {}
    )
    name = failure.call.strip("_")
    why = (
        f"{name} at {failure.place} has no finite value or slope for its argument of "
        f"{smallest if smallest is not None else 0:.3g}, at step {failure.step}"
    )
    yield Finding(
        "undefined_operation",
        "critical",
        (failure.place,),
        numbers,
        why,
        fix=OPERATIONS[failure.call],
    )


def _straight(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    bend = number(w.get("bend"))
    layers = [i for i in ev.chain if ev.site(i).role == "weight"]
    bends = [s for s in ev.record.sites[: layers[-1] if layers else 0] if s.role == "activation"]
    if bend is None or bend >= e.BENT or len(layers) < 2 or bends:
        return  # with activations in between, odd weights make it straight
    bent, straight = (number(w.get(f"explained_{k}")) for k in ("bent", "straight"))
    gain = bent - straight if bent is not None and straight is not None else 0.0
    harmed = ev.trained and ev.learned < e.LEARNED and not w.get("target_is_input")
    numbers = {"bend": bend, "layers": float(len(layers))}
    why = f"{len(layers)} layers with weights act as one: there is no activation between them"
    if gain > e.BENDS:
        numbers |= {"explained_bent": bent or 0.0, "explained_straight": straight or 0.0}
        why += (
            f"; a shallow model explains {bent:.0%} of the targets with bends, "
            f"{max(straight or 0.0, 0.0):.0%} without"
        )
    severity = "warning" if harmed or gain > e.BENDS else "info"
    if gain > e.BENDS and (harmed or not ev.trained):
        severity = "critical"
    names = tuple(ev.site(i).name for i in layers)
    yield Finding(
        "no_nonlinearity",
        severity,
        names,
        numbers,
        why,
        fix=f"nn.ReLU() between {names[0]} and {names[1]}",
    )


def _order(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    apart = number(w.get("order_apart"))
    if apart is None or apart >= e.APART:
        return
    nexts = (number(w.get("target_is_next")) or 0.0) >= 0.95
    gain = number(w.get("order_gain")) or 0.0
    matters = nexts or gain > e.BENDS
    why = "shuffled positions give the same answers: attention does not know where a token stands"
    why += f"; a shallow model explains {gain:.0%} more with the order" if gain > e.BENDS else ""
    yield Finding(
        "no_positions",
        "critical" if matters else "info",
        (),
        {"order_apart": apart},
        why,
        fix="x = x + self.positions(torch.arange(x.shape[1], device=x.device))",
    )


def _padding(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    share = number(w.get("padding")) or 0.0
    apart, counted = (number(w.get(f"padding_{k}")) for k in ("apart", "counted"))
    harmed = not ev.trained or ev.learned < e.LEARNED
    if apart is not None and apart >= e.PADDED and share >= e.PADDING:
        why = (
            f"{share:.0%} of the positions are padding, and answers change by {apart:.0%} when it "
            "is cut off: states, means or attention run over it"
        )
        numbers = {"padding_apart": apart, "padding": share}
        yield Finding(
            "padding_seen",
            "warning" if harmed else "info",
            (),
            numbers,
            why,
            fix="mask = tokens == 0: src_key_padding_mask=mask in attention, (h * ~mask).sum(1) / "
            "(~mask).sum(1) for a mean; pack_padded_sequence for a recurrent layer",
        )
    if counted is not None and counted >= e.PADDING:
        why = f"{counted:.0%} of the positions that the loss counts are padding"
        yield Finding(
            "padding_in_loss",
            "warning",
            ("the loss",),
            {"padding": counted},
            why,
            fix="nn.CrossEntropyLoss(ignore_index=padding), or a mask on the loss of each position",
        )


def _random(ev: Evidence) -> Iterable[Finding]:
    w = facts(ev)
    spread = number(w.get("eval_spread")) or 0.0
    if spread < e.APART:
        return
    places = tuple(w.get("eval_places") or ())
    why = f"two passes in evaluation mode on the same rows differ by {spread:.0%}"
    if w.get("eval_dropout"):
        fix = "F.dropout(x, p, training=self.training), or nn.Dropout(p) made in __init__"
        yield Finding("random_in_eval", "warning", places, {"eval_spread": spread}, why, fix=fix)
    else:
        yield Finding(
            "random_in_eval",
            "info",
            places,
            {"eval_spread": spread},
            why,
            fix="if self.training: around what is drawn",
        )


def _few_rows(ev: Evidence) -> Iterable[Finding]:
    counts = facts(ev).get("norm_values") or {}
    few = {n: c for n, c in counts.items() if 2 <= c <= e.FEW_VALUES}
    if not few:
        return
    least = min(few.values())
    harmed = not ev.trained or ev.learned < e.LEARNED or ev.generalised < e.LEARNED
    why = f"mean and deviation of a channel are taken of {least} values: noise of the batch"
    yield Finding(
        "batchnorm_few_rows",
        "warning" if harmed else "info",
        tuple(few),
        {"norm_values": float(least), "batch_size": float(ev.record.batch_size)},
        why,
        fix=f"batches of 16 rows or more; or nn.GroupNorm(1, channels) in place of {min(few)}",
    )


def _short_floats(ev: Evidence) -> Iterable[Finding]:
    stuck = {
        i: share
        for i in ev.chain
        if (share := middle(p.readings[i].stuck for p in ev.record.probes[-6:])) is not None
    }
    sick = [i for i, share in stuck.items() if share >= e.STUCK]
    if not sick or ev.learned >= e.LEARNED:
        return
    worst = max(stuck[i] for i in sick)
    why = (
        f"{worst:.0%} of the weights that have a gradient stay the same in a step: the step is "
        "smaller than what their 16-bit numbers resolve"
    )
    names = tuple(ev.site(i).name for i in sick)
    yield Finding(
        "updates_lost",
        "critical",
        names,
        {"stuck": worst},
        why,
        fix="model.float(), and torch.autocast(..., torch.bfloat16) around the forward pass",
    )


def _shared(ev: Evidence) -> Iterable[Finding]:
    shared = tuple(ev.record.static.get("shared") or ())
    if shared:
        why = f"the same layer stands in {len(shared)} places of one container"
        yield Finding(
            "shared_layers",
            "info",
            shared,
            {"layers": float(len(shared))},
            why,
            fix="a new layer for each place: [make_layer() for _ in range(n)]",
        )
