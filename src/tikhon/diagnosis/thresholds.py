"""Every threshold of the checks, in one place: its unit, and where it comes from.

gap: no run of 159 healthy and 363 faulty ones lies between the two sides of it; recordings: set on
recordings of about 180 labelled programs, without a set kept apart; twins: set between programs
with one fault and the same programs without it; convention: a definition.
Standard library only. `MEASURES` says the unit and the healthy range of all evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

# symptoms

VANISHED = 1e-3  # backprop signal, first / last layer: sick <= 2.1e-4, healthy >= 6.9e-3 (gap)
EXPLODED = 1e3  # the same on the other side: healthy <= 46, exploding >= 2e4 (gap)
TIME_VANISHED = -10.0  # log10 over the time steps: healthy >= -8, vanishing underflows (gap)
TIME_EXPLODED = 3.0  # log10 over the time steps: healthy <= 0, exploding >= 6 (gap)
DEAD = 0.6  # share of dead units of a layer: healthy <= 0.56, dying >= 0.96 (gap)
SATURATED = 0.5  # share of saturated entries: healthy <= 0.40, saturated >= 0.54 (gap)
SLOW_UPDATE = 1e-4  # update / weight in a step: healthy >= 1.6e-4, too small <= 3e-5 (gap)
SMALL_UPDATE = 1e-3  # the same, below which a faster run is tried (convention)
LARGE_EPS = 1e-2  # of Adam and its kin: their own is 1e-8 (convention)
HEAVY = 0.95  # momentum from which a step sums more than 20 gradients (convention)
STEADIER = 0.1  # skill that a control run adds whose change is small (convention)
SPIKE = 1e3  # largest gradient norm / first one, while nothing is learned (convention)
INITIAL_LOSS = 3.0  # first loss / trivial loss, only together with large weights (convention)
LOUD = 5.0  # first loss / trivial loss of scores of classes that takes long to undo (convention)
SOLVED = 0.95  # accuracy on the training rows to which nothing is missing (convention)
LARGE_WEIGHTS = 2.5  # rms(W) * sqrt(fan_in): He 1.41, Xavier and LeCun 1, PyTorch default 0.58
SMALL_WEIGHTS = 0.25  # the same on the other side
OUTLIER = 20.0  # a layer this many times smaller than the median one is singled out
LEARNED = 0.9  # skill relative to a shallow model on the same data (convention)
LIVELY = 0.21  # fall of the loss late in a run / all of its motion (recordings)
FAR_BEHIND = 0.5  # skill relative to a shallow model on the same data (convention)
STILL = 0.02  # of skill, and of the first loss, that is nothing learned (convention)
RISE = 0.15  # relative rise of a loss above its own minimum (convention)
# upward move of a late loss curve / its level: else <= 0.011, oscillating >= 0.018 (recordings)
SWING = 0.015
FASTER = 1.5  # fall of a loss in a third of a run / in the one before, without end (convention)
FAR_BELOW = 10.0  # of the first loss, and of 1, below zero (convention)
DIVERGED = 3.0  # loss late in a run / its start or a constant's (convention)
BACK = 0.34  # share of a loss curve's motion that goes up: 0.5 is a walk (recordings)
GAP = 0.1  # train metric minus validation metric (convention)
FLOOR = 0.1  # share of the trivial loss that the head cannot get below (convention)
RESTRAINED = 0.85  # skill below which what visibly restrains a network is held against it
BALANCED = 0.45  # penalty's share late in a run that settled against it: in theory one half
RESTRAINING = 0.6  # penalty's share on the way to such a balance (convention)
DOMINANT = 0.9  # share of a gradient that comes from the penalty (convention)
NARROW = 1e-3  # diversity below which all samples look alike to the network (measured: sick 3e-4)

# the weight factor rms(W) * sqrt(fan) that keeps a signal's size through an activation
IDEAL = {
    "relu": 1.41,
    "relu6": 1.41,
    "leaky_relu": 1.41,
    "gelu": 1.5,
    "silu": 1.7,
    "mish": 1.6,
    "elu": 1.2,
    "softplus": 1.2,
    "hardswish": 1.7,
}

HARDLY = 0.3  # skill below which a run that still falls has not begun to learn (convention)

MOVED_STATISTICS = 30  # steps after which running statistics at their usual pace have moved
EXCESS = 0.2  # loss in eval mode above that in train mode / a constant's loss (convention)
FEW_PASS = 0.8  # rate of dropout at which little more than noise is left (convention)
FREED = 0.3  # skill that training what is frozen or left out adds (convention)

# wiring

# change of an answer that should not change / size of the answers [ratio]: arithmetic in another
# order leaves up to 2e-6, missing batch_first, a softmax over rows or a missing mask 0.1 and more
APART = 1e-3
# entropy of attention at the start / that of looking everywhere alike [share]: scores divided by
# the root of their size leave 0.9 and more, undivided ones of size 64 less than 0.5 (twins)
FOCUSED = 0.6
# change of the loss gradient at other rows / at the row whose target changed [ratio]: 0 for losses
# that are means over rows, 1/rows for roots of means, 1 where shapes broadcast (twins)
PULL = 0.5
# spread of what a network that draws gives back / spread of its inputs [ratio]: codes that say
# nothing leave 0.08 and less, trained ones 0.65 and more (twins)
GIVEN_BACK = 0.2
LONG = 100  # steps after which a code should say something (convention)
# change of an answer when padding is cut off / size of the answers [ratio]: masks leave 1e-6, an
# average over padding 0.1 and more (twins)
PADDED = 0.02
# differences of lines with channels last / as given [ratio]: pictures 1.4 to 2.4, mixed ones 0.1
# to 0.4, noise 1 (digits, photographs)
SMOOTHER = 0.5
BETWEEN = 8.0  # variance of batch means / that of shuffled batches: 8 means stay below 3 (theory)
UNHEARD = 0.5  # rows whose targets move no gradient [share] (convention)
ALWAYS = 0.98  # rows that get one answer, to be called always that answer [share] (convention)
MASKED = 0.8  # entries of a mean that a mask made zero: steps are 5 times smaller (convention)
UNLIFTED = 0.05  # rows whose own class has a score that a rectifier keeps at 0 (convention)
PADDING = 0.2  # share of the positions that are padding from which it counts (convention)
# bend of the network / spread of its answers [ratio]: a straight network leaves 1e-6, one ReLU 0.1
BENT = 1e-3
# agreement with held-out targets [deviations of shuffled targets]: the largest of four looks at
# chance stays below 3 in 99 of 100 draws (convention)
RELATED = 3.0
RELATED_ROWS = 200  # [rows] below which three deviations need a relation stronger than usual ones
ADVANTAGE = 0.05  # true over shuffled targets, of the trivial loss, after the dry run (convention)
MAJORITY = 0.75  # share of one class from which an accuracy can be its own [share] (convention)
RARER = 2.0  # share of the commonest class / that of the rarest [ratio] (convention)
COUNTED_LESS = 1.5  # weight of the commonest class / that of the rarest [ratio] (convention)
SHIFT = 1.0  # distance of validation from training inputs [deviations of training] (convention)
MOST_LEFT_OUT = 0.5  # pixels whose target is no class, where class 0 never occurs [share]
UNTOLD = 0.1  # of a part of the loss that the order of its targets saves [share] (convention)
TOLD = 0.05  # and of another part of it, at least (convention)
TOLD_MORE = 5.0  # times what it saves of the first one (convention)
ROW_BESIDE = 0.3  # of the variance that the row beside explains, its own none [share] (convention)
MOST_STILL = 0.5  # input columns of one value, where the rest tells little [share] (convention)
LITTLE = 0.1  # of the variance that shallow models explain, held out [share] (convention)
DROWNED = 300.0  # slope of the loss at one column of targets / at another [ratio] (convention)
RIGHT_COSTS = 0.1  # loss of right answers; of shares of shares 0, of k classes log k (theory)
PART_SUM = 0.2  # of the loss that is a sum, where the rest is a mean [share]: else 0 (theory)
TARGETS_MOVED = 2.0  # mean of the targets, last to first epoch [deviations]: else 0 (twins)
MOVED = 0.2  # pairs whose map fits when turned; of maps that fit none are (convention)
UNKNOWN = 0.25  # rows whose target is no better an answer than others [share] (convention)
ONE_SIGN = 0.3  # entries whose unit is on for some rows and off for others [share] (convention)
OFFSET = 30.0  # size of the inputs / their deviation: pixels have 2, years 100 (convention)
STRETCH = 3.0  # deviation of validation / training inputs, or its inverse [ratio] (convention)
CLASS_SHIFT = 0.3  # total variation of class shares, training to validation [share] (convention)
SQUEEZED = 0.2  # input columns whose deviation is that of a few rows [share] (convention)
DOUBLES = 0.2  # validation rows that are training rows, beyond what repeats there [share]
MAPPED = (
    0.3  # validation rows that are right once classes change their numbers [share] (convention)
)
REPEATED = 0.1  # training rows that are there twice, as where rare ones are repeated (convention)
FITS = 0.25  # accuracy above the majority's, or correlation, that is a relation (convention)
HARDLY_FITS = 0.12  # the same, where validation rows have it among themselves and not at all
COPIES = 0.5  # validation rows that are copies of training rows [share] (convention)
RIMS = 0.25  # single pixels between two classes that are no neighbours: masks leave 0.03 [share]
DRAWN = 0.1  # rows of the data that a sampler can draw [share] (convention)
SORTED = 0.6  # classes in a batch / classes expected in a shuffled one [ratio] (convention)
FEW_VALUES = 4  # that a batch normalisation averages over [rows x pixels]: deviation known to 40 %
STUCK = 0.5  # weights with a gradient that a step leaves as they are [share] (convention)
BENDS = 0.05  # what bends explain beyond straight lines [share of the variance] (convention)
BY_CLASS = 0.15  # accuracy by classes above that of rounded numbers [share] (convention)
TURN = 3.0  # variance left of an angle as a number / of its cosine and sine [ratio] (convention)
OWN_GAIN = (
    0.05  # of a constant's loss that a shallow model must save to be a yardstick (convention)
)
WEAK = 0.02  # skill of a shallow model that counts as a ceiling if it is beyond chance [share]


@dataclass(frozen=True)
class Measure:
    """The unit of a number of evidence and the range in which healthy programs have it."""

    unit: str
    low: float | None = None
    high: float | None = None


# control runs, by what is changed in them
CONTROLLED = (
    "calmer steadier faster undropped undecayed leaky scaled unhooked bared skipped unfrozen"
).split()
MEASURES: dict[str, Measure] = {
    "signal_ratio": Measure("signal at the first layer / at the last", VANISHED, EXPLODED),
    "time_ratio_log10": Measure(
        "log10 of the gradient, first / last steps", TIME_VANISHED, TIME_EXPLODED
    ),
    "recurrent_gain": Measure("factor per time step", 0.5, 1.5),
    "gradient_spike": Measure("times the first gradient norm", None, SPIKE),
    "step": Measure("optimizer steps"),
    "dead": Measure("share of units", None, DEAD),
    "dead_at_start": Measure("share of units", None, DEAD),
    "saturated": Measure("share of entries", None, SATURATED),
    "at_start": Measure("share of entries", None, SATURATED),
    "floor": Measure("share of a constant's loss", None, FLOOR),
    "weight_factor": Measure("rms(W) sqrt(fan_in)", SMALL_WEIGHTS, LARGE_WEIGHTS),
    "usual": Measure("rms(W) sqrt(fan_in)"),
    "ideal": Measure("rms(W) sqrt(fan_out)"),
    "initial_loss": Measure("times a constant's loss", None, INITIAL_LOSS),
    "constant_layers": Measure("layers", None, 0),
    "bias": Measure("times the weighted input", None, 3.0),
    "swing": Measure("rise per look / loss", None, SWING),
    "climb": Measure("late loss / its start or a constant's", None, DIVERGED),
    **dict.fromkeys(CONTROLLED, Measure("0 a constant, 1 a shallow model")),
    "part_gain": Measure("share of a part of the loss", UNTOLD, None),
    "own_score_zero": Measure("share of rows", None, UNLIFTED),
    "moved_alone": Measure("share of rows", None, 0.5),
    "fits_moved": Measure("share of rows", None, MOVED),
    "ahead": Measure("positions", None, 1),
    "momentum": Measure("share of the last step", None, HEAVY),
    "upward_share": Measure("share of the motion of the loss", None, BACK),
    "update_ratio": Measure("change of weights per step / weights", SLOW_UPDATE, 0.1),
    "gap": Measure("training minus validation metric", None, GAP),
    "rise": Measure("share of the lowest validation loss", None, RISE),
    "best_step": Measure("optimizer steps"),
    "learned": Measure("0 a constant, 1 a shallow model", LEARNED, None),
    "penalty_share": Measure("share of the gradient", None, RESTRAINING),
    "weight_decay": Measure("of the optimizer"),
    "dropout": Measure("share of units dropped", 0.0, 0.9),
    "rate": Measure("share of units dropped", 0.0, 0.9),
    "width": Measure("units"),
    "tensors": Measure("tensors", None, 0),
    "parameters": Measure("parameter tensors"),
    "rms": Measure("root mean square", 0.01, 10.0),
    "offset": Measure("root mean square / deviation", None, OFFSET),
    "batch_size": Measure("rows", 2, None),
    "train_mode_loss": Measure("loss"),
    "eval_mode_loss": Measure("loss"),
    "entropy": Measure("share of uniform attention", 0.1, None),
    "entropy_divided": Measure("share of uniform attention", FOCUSED, None),
    "size": Measure("numbers in a query"),
    "scale": Measure("last / first loss scale", 1 / 1024, 1024),
    "inits": Measure("draws of the weights", None, 0),
    "pull_on_others": Measure("gradient at other rows / at the own row", None, PULL),
    "order_of_rows": Measure("change of answers / answers", None, APART),
    "masked": Measure("share of what is averaged", None, MASKED),
    "unheard": Measure("share of rows", None, UNHEARD),
    "box_beaten": Measure("share of rows", None, UNKNOWN),
    "answered": Measure("share of rows that get the majority's answer"),
    "between": Measure("variance of the means of batches / expected one", None, BETWEEN),
    "pulls_away": Measure("share of rows whose output is pulled away from the target", None, 0.9),
    "padding_apart": Measure("change of answers without padding / answers", None, PADDED),
    "padding": Measure("share of positions"),
    "nearer": Measure("deviations of the mean", None, 5.0),
    "rows_apart": Measure("change of answers / answers", None, APART),
    "future_apart": Measure("change of answers / answers", None, APART),
    "given_back": Measure("spread of answers / spread of inputs", GIVEN_BACK, None),
    "only_step": Measure("step of the inputs"),
    "input_length": Measure("steps of the inputs"),
    "unread": Measure("share of the entries of a row", None, 0),
    "inputs": Measure("tensors"),
    "target_given": Measure("change of answers / answers", None, APART),
    "order_apart": Measure("change of answers / answers", APART, None),
    "eval_spread": Measure("change of answers / answers", None, APART),
    "bend": Measure("bend / spread of the answers", BENT, None),
    "target_low": Measure("target"),
    "target_high": Measure("target"),
    "log_sum": Measure("largest |log of the sum of probabilities|", None, 1e-3),
    "ones_in_a_row": Measure("classes per row", None, 1.0),
    "class_gain": Measure("accuracy by classes minus by rounding", None, BY_CLASS),
    "relation": Measure("deviations of shuffled targets", RELATED, None),
    "advantage": Measure("loss on shuffled minus on true targets / trivial loss", ADVANTAGE, None),
    "related_rows": Measure("rows"),
    "lines": Measure("change from line to line / deviation"),
    "lines_read": Measure("the same with channels last / deviation"),
    "constant_columns": Measure("share of input columns", None, 0.9),
    "drift": Measure("deviation of inputs, late / at first", 1 / STRETCH, STRETCH),
    "summed": Measure("share of the loss that grows with the batch", None, PART_SUM),
    "left_out": Measure("share of the pixels", None, MOST_LEFT_OUT),
    "row_beside": Measure("share of the variance, held out", None, ROW_BESIDE),
    "column_pull": Measure("slope at one column of targets / at another", None, DROWNED),
    "targets_moved": Measure(
        "deviations of the targets, last to first epoch", None, TARGETS_MOVED
    ),
    "turn": Measure("unexplained of the number / of its cosine and sine", None, TURN),
    "squeezed": Measure("share of input columns", None, SQUEEZED),
    "columns": Measure("input columns", None, 0),
    "majority": Measure("share of rows", None, MAJORITY),
    "counted_less": Measure("weight of the commonest class / of the rarest", None, COUNTED_LESS),
    "accuracy": Measure("share of rows"),
    "valid_shift": Measure("deviations of training inputs", None, SHIFT),
    "valid_scale": Measure("deviation, validation / training", 1 / STRETCH, STRETCH),
    "class_shift": Measure("total variation of class shares", None, CLASS_SHIFT),
    "new_classes": Measure("classes", None, 0),
    "valid_right": Measure("share of validation rows"),
    "valid_mapped": Measure("share of validation rows"),
    "fits_train": Measure("accuracy above the majority's share, or correlation"),
    "fits_valid": Measure("accuracy above the majority's share, or correlation"),
    "rims": Measure("share of the borders of classes that are no neighbours", None, RIMS),
    "drawable": Measure("rows"),
    "period": Measure("rows"),
    "rows_in_both": Measure("share of validation rows", None, DOUBLES),
    "classes_in_batch": Measure("classes per batch"),
    "classes_in_all": Measure("classes"),
    "norm_values": Measure("values per channel in a batch", FEW_VALUES + 1, None),
    "stuck": Measure("share of weights with a gradient", None, STUCK),
    "explained_bent": Measure("share of the variance, held out"),
    "explained_straight": Measure("share of the variance, held out"),
    "silent_classes": Measure("classes", None, 0),
    "smallest": Measure("argument of the function"),
    "layers": Measure("layers with weights"),
    "made": Measure("trainable tensors per forward pass", None, 0),
    "loss": Measure("loss"),
}
