"""All options of a training, shared by Python, recipe files, the command line and search spaces.

The fields of `Recipe` and `Settings` are declared here, separate from their implementation, so
that the command line can list them before torch is imported.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

# Panels of --help.
DATA, MODEL, REGULARIZATION = "Data", "Model", "Regularization"
TRAINING, OUTPUT = "Training", "Output"

# Names for shell completion, defined where torch is imported.
SOURCES = ("digits", "breast_cancer", "wine", "iris", "diabetes", "mnist", "fashion-mnist")
MODELS = ("linear", "mlp", "lenet-300-100", "lenet5", "convnet", "skip:mlp", "spline:mlp")
LOSSES = ("cross_entropy", "nll", "bce", "mse", "half_mse", "mae", "huber")
OPTIMIZERS = ("sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adagrad")
SCHEDULES = ("constant", "cosine", "linear", "warmup_cosine")
DEVICES = ("auto", "cpu", "cuda", "mps")
MODES = ("objective", "decoupled")
SPARSE_PENALTIES = tuple(  # those that `tikhon path` follows
    "l1 elastic_net group_lasso sparse_group_lasso group_mcp mcp scad slope log_sum l_inf "
    "hierarchical nuclear_norm spectral_norm total_variation".split()
)
PENALTIES = (
    *SPARSE_PENALTIES,
    *"l2 huber orthogonal box l1_ball l2_ball spectral_ball max_norm min_max_norm".split(),
    *"unit_norm non_negative simplex top_k".split(),
)
METHODS = tuple(
    "none l1 l2 elastic_net group_lasso mcp auto dropout early_stopping label_smoothing mixup "
    "input_noise ema".split()
)


@dataclass(frozen=True)
class Option:
    """Description of a field, and its use by the command line and by searches.

    Args:
        help: one sentence.
        kind: type of the command line value; optional without a default.
        panel: of --help; the general one if None.
        flags: names on the command line, if other than the field's.
        metavar: placeholder of the value.
        shown: its default in words.
        search: for fields that a search varies, whether larger values give a simpler model;
            otherwise what to do instead, in words.
        names: values for shell completion.
    """

    help: str
    kind: Any = str
    panel: str | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    shown: str | None = None
    search: bool | str = ""
    names: tuple[str, ...] = ()


def option(
    default: object,
    help: str,
    kind: object = str,
    panel: str | None = None,
    *,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    shown: str | None = None,
    search: bool | str = "",
    names: tuple[str, ...] = (),
) -> Any:
    """Declare a dataclass field that is an option; arguments as for `Option`."""
    told = Option(help, kind, panel, flags, metavar, shown, search, names)
    return field(default=default, metadata={"option": told})


def options_of(kind: type) -> dict[str, tuple[Option, Any]]:
    """Return the options among the fields of a dataclass, with their defaults.

    >>> told, default = options_of(TrainingOptions)["batch_size"]
    >>> told.help, default
    ('Rows per step.', 64)
    """
    fields = dataclasses.fields(kind)
    return {f.name: (f.metadata["option"], f.default) for f in fields if "option" in f.metadata}


DATA_FLAGS = frozenset(
    "--target --task --time --group --drop --categorical --sep --decimal --dates --encoding "
    "--na-values --on-bad-row --data-dir".split()
)
_OF_TRAINING = frozenset({"--model", "--batch-size", "--seed"})
_CARRIED_FLAGS = {
    "fit": DATA_FLAGS | _OF_TRAINING,
    "compare": DATA_FLAGS | _OF_TRAINING,
    "tune": DATA_FLAGS | _OF_TRAINING | {"--loss", "--device", "--test"},
    "predict": frozenset({"--data-dir"}),
}  # what a verb takes over from the command of another
FLAGS = frozenset(
    "--compact --linear --no-linear --importances --no-importances --refit --join --debias "
    "--resume --overwrite --json --quiet -q --verbose -v --debug --full --quick --open "
    "--spreadsheet --single".split()
)  # take no value


def split_command(command: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Split a command line into options with their values; other words get the name "".

    >>> list(split_command(["a.csv", "--json", "--target", "y"]))
    [('', ['a.csv']), ('--json', ['--json']), ('--target', ['--target', 'y'])]
    """
    rest = iter(command)
    for word in rest:
        name, given, _ = word.partition("=") if word.startswith("-") else ("", "", "")
        alone = not name or given or name in FLAGS
        yield name, [word] if alone else [word, *itertools.islice(rest, 1)]


def remove_options(command: Iterable[str], *options: str) -> list[str]:
    """Remove options from a command line, with values in either spelling.

    >>> remove_options(["tikhon", "fit", "a.csv", "-o", "out"], "--output", "-o")
    ['tikhon', 'fit', 'a.csv']
    """
    return [
        word for name, words in split_command(command) if name not in options for word in words
    ]


def rerun_command(command: Sequence[str]) -> list[str]:
    """Return the command to run again, without output and verbosity options."""
    return remove_options(command, *"--output -o --overwrite --json --quiet -q --verbose".split())


def with_reruns(config: Mapping[str, Any], commands: Sequence[str]) -> list[str]:
    """Suggest what to run next for a table: first what its notices ask for.

    Without columns that leak the target, and only that; or with groups of rows kept together, or
    the latest rows held out.
    """
    notices = (config["data"].get("table") or {}).get("notices", ())
    values = [(n["key"], n["values"]) for n in notices if "key" in n]

    def rerun(options: Iterable[str]) -> str:
        return shlex.join([*rerun_command(config["command"]), *options])

    leaks = [v["options"] for key, v in values if key.startswith("notice_leak")]
    if leaks:
        return [rerun(shlex.split(" ".join(leaks)))]
    groups, order = map(dict(values).get, ("notice_groups", "notice_in_order"))
    first = [rerun(shlex.split(groups["option"]))] if groups else []
    timed = order and config["command"][1] in ("fit", "tune", "compare")
    last = [rerun(["--time", *shlex.split(order["column"])])] if order and timed else []
    return [*first, *commands, *last]


def command_for(verb: str, command: Sequence[str]) -> list[str]:
    """Return the command of another verb for the data and the settings that both have.

    >>> command_for("tune", ["tikhon", "fit", "--l2", "1e-3", "a.csv", "--model", "mlp:8"])
    ['tikhon', 'tune', 'a.csv', '--model', 'mlp:8']
    """
    parts = list(split_command(command[2:]))
    data = [word for name, words in parts if not name for word in words]
    kept = _CARRIED_FLAGS[verb]
    options = [word for name, words in parts if name in kept for word in words]
    return ["tikhon", verb, *data[:1], *options]


_ALONE = "search once for each value"
_OWN = "give it to tune, as its own argument"


def _off_option(
    default: object, help: str, metavar: str = "X", search: bool | str = _ALONE
) -> Any:
    return option(
        default, help, float, REGULARIZATION, metavar=metavar, shown="off", search=search
    )


@dataclass(frozen=True, eq=False)
class RecipeOptions:
    """Fields of a `Recipe`; all optional on the command line, as a recipe file may set them."""

    penalties: Any = option(
        (),
        "Any penalty, on the weights that match PATTERN; may be repeated.",
        list[str],
        REGULARIZATION,
        flags=("--penalty",),
        metavar="[PATTERN=]NAME:S[,KEY=VALUE]",
        names=PENALTIES,
        search="name a penalty, such as l1, with the range of its strength",
    )
    dropout: float | Mapping[str, float] | None = _off_option(
        None, "Dropout rate of the hidden units.", "RATE", search=True
    )
    label_smoothing: float = _off_option(
        0.0, "Share of each label spread over all classes.", search=True
    )
    confidence_penalty: float = _off_option(
        0.0, "Weight of the negative entropy of the predictions."
    )
    r_drop: float = _off_option(0.0, "Weight of the distance between two passes with dropout.")
    mixup: float = _off_option(
        0.0, "Mix pairs of rows; ALPHA of the Beta distribution.", "ALPHA", search=True
    )
    cutmix: float = _off_option(
        0.0, "Paste patches between images; ALPHA of the Beta distribution.", "ALPHA"
    )
    input_noise: float = _off_option(0.0, "Standard deviation of noise on the inputs.")
    learning_rates: Any = option(
        None,
        "Learning rates of parts of the model, in place of lr.",
        str,
        REGULARIZATION,
        metavar="PATTERN=LR,...",
        shown="lr",
        search="give lr a dictionary from patterns to ranges",
    )
    clip_norm: float | None = _off_option(
        None, "Clip the norm of the gradient at X.", search=False
    )
    clip_value: float | None = _off_option(None, "Clip each entry of the gradient at X.")
    clip_adaptive: float | None = _off_option(
        None, "Clip each unit's gradient norm at X times its weight norm."
    )
    sparsify: Any = option(
        None,
        "Share to make exactly zero, such as 90% (of the weights) or 50%,of=channels.",
        str,
        REGULARIZATION,
        metavar="SHARE[,KEY=VALUE]",
        shown="off",
        search=_ALONE,
    )
    averaging: str | None = option(
        None,
        "Average of the weights over the steps: ema or swa.",
        str,
        REGULARIZATION,
        metavar="NAME",
        names=("ema", "swa"),
        shown="off",
        search=_ALONE,
    )
    ema_decay: float = option(
        0.99,
        "Share of the average that ema keeps at each step.",
        float,
        REGULARIZATION,
        metavar="X",
        shown="0.99",
        search=_ALONE,
    )
    early_stopping: int | None = option(
        None,
        "Stop after so many epochs without improvement and keep the best state.",
        int,
        REGULARIZATION,
        metavar="EPOCHS",
        shown="off with --epochs, else by rows",
        search="a search ends poor trials by itself",
    )


@dataclass(frozen=True)
class TrainingOptions:
    """Fields of `Settings`: how a model is trained, other than regularization."""

    loss: str | Callable[..., Any] = option(
        "auto",
        "cross_entropy, bce, mse, half_mse, mae, ... or auto (by the target).",
        panel=TRAINING,
        metavar="NAME",
        search=_OWN,
        names=("auto", *LOSSES),
    )
    optimizer: str | Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] = option(
        "adam",
        "sgd, adam, adamw, nadam, radam, rmsprop or adagrad.",
        panel=TRAINING,
        metavar="NAME",
        search=False,
        names=OPTIMIZERS,
    )
    lr: float = option(1e-3, "Learning rate.", float, TRAINING, search=False)
    momentum: float = option(0.0, "Momentum of sgd and rmsprop.", float, TRAINING, search=_ALONE)
    schedule: str = option(
        "constant",
        "Of the learning rate: constant, cosine, linear or warmup_cosine.",
        panel=TRAINING,
        metavar="NAME",
        names=SCHEDULES,
        search="every trial has the cosine schedule",
    )
    batch_size: int = option(64, "Rows per step.", int, TRAINING, search=False)
    epochs: int = option(
        20,
        "Passes over the training rows.",
        int,
        TRAINING,
        metavar="N",
        shown="until the validation loss stops improving, at most 60 s",
        search=_OWN,
    )
    seed: int = option(0, "Seed of all random numbers.", int, TRAINING, search=False)
    device: str = option(
        "auto",
        "auto, cpu, cuda or mps.",
        panel=TRAINING,
        metavar="NAME",
        search=_OWN,
        names=DEVICES,
    )
    budget: float | None = option(
        None,
        "Wall time in all, such as 60s, 5m or 1h.",
        panel=TRAINING,
        metavar="TIME",
        search=_OWN,
    )


@dataclass(frozen=True)
class Strength:
    """A penalty on all weight matrices with an option of its own, its strength."""

    penalty: str
    how: str  # the mode, which sets the unit of the strength
    help: str
    flag: bool = True  # whether it has its own option; `--penalty NAME:S` always works


# `--NAME S` on the command line, `NAME = range` in a space, else an entry of `penalties`.
STRENGTHS = {
    "l1": Strength("l1", "objective", "L1: strength of the sum of |w|"),
    "l2": Strength("l2", "objective", "L2: strength of half the sum of w²"),
    "weight_decay": Strength("l2", "decoupled", "Decoupled weight decay, as in AdamW,"),
    "elastic_net": Strength(
        "elastic_net", "objective", "Elastic net: strength of L1 and L2 in equal parts"
    ),
    "group_lasso": Strength(
        "group_lasso", "objective", "Group lasso: strength of the sum of row norms"
    ),
    "mcp": Strength("mcp", "objective", "Strength of the minimax concave penalty", False),
    "scad": Strength("scad", "objective", "Strength of SCAD", False),
    "log_sum": Strength("log_sum", "objective", "Strength of the sum of logarithms", False),
    "huber": Strength("huber", "objective", "Strength of Huber's penalty", False),
}


def with_mode(name: str) -> str:
    """Return a hyperparameter's name, for strengths with the mode, which sets the unit.

    >>> with_mode("weight_decay"), with_mode("lr"), with_mode("l1[fc1.*]")
    ('weight_decay (decoupled)', 'lr', 'l1[fc1.*] (objective)')
    """
    own, _ = split_name(name)
    return f"{name} ({STRENGTHS[own].how})" if own in STRENGTHS else name


def split_name(name: str) -> tuple[str, str]:
    """Split an entry into hyperparameter and pattern.

    >>> split_name("l1[fc1.*]"), split_name("lr")
    (('l1', 'fc1.*'), ('lr', '*'))
    """
    own, _, pattern = name.partition("[")
    return own, pattern.removesuffix("]") or "*"


def training_fields() -> Iterator[tuple[str, Option, Any]]:
    """Yield name, option and default of every field of a recipe and of the settings."""
    for kind in (RecipeOptions, TrainingOptions):
        for name, (told, default) in options_of(kind).items():
            yield name, told, default


def format_options(flag: str, *values: str) -> str:
    """Format an option given once for each value, as a shell reads it.

    >>> format_options("--drop", "id", "first name")
    "--drop=id '--drop=first name'"
    """
    return shlex.join(f"{flag}={value}" for value in values)


def format_penalty(entry: Mapping[str, Any]) -> str:
    """Format a penalty entry of a recipe for `--penalty`.

    >>> format_penalty({"pattern": "fc1.*", "penalty": "l2", "strength": 0.1, "how": "decoupled"})
    'fc1.*=l2:0.1,how=decoupled'
    """
    pattern, strength = entry.get("pattern", "*"), entry.get("strength")
    named = entry["penalty"] if strength is None else f"{entry['penalty']}:{_short(strength)}"
    others = [
        f",{key}={_short(value)}"
        for key, value in entry.items()
        if key not in ("pattern", "penalty", "strength") and value not in (None, [], {}, "")
    ]
    return ("" if pattern == "*" else f"{pattern}=") + named + "".join(others)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
