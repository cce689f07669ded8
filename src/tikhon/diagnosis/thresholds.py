"""All thresholds of the checks, with unit and origin.

gap: none of 159 healthy and 363 faulty runs lies between the two values given; recordings: fitted
to recordings of about 180 labelled programs, without a held-out set; twins: chosen between
programs with one fault and the same programs without it; convention: a definition.
Standard library only. `MEASURES` holds the unit and the healthy range of all evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

# symptoms

VANISHED = 1e-3  # rms gradient, first / last layer: faulty <= 2.1e-4, healthy >= 6.9e-3 (gap)
EXPLODED = 1e3  # the same ratio, upper limit: healthy <= 46, exploding >= 2e4 (gap)
TIME_VANISHED = -10.0  # log10 of decay over time steps: healthy >= -8, vanishing underflows (gap)
TIME_EXPLODED = 3.0  # log10 of growth over time steps: healthy <= 0, exploding >= 6 (gap)
DEAD = 0.6  # share of dead units of a layer: healthy <= 0.56, dying >= 0.96 (gap)
SATURATED = 0.5  # share of saturated entries: healthy <= 0.40, saturated >= 0.54 (gap)
SLOW_UPDATE = 1e-4  # norm of update / weights per step: healthy >= 1.6e-4, too small <= 3e-5 (gap)
SMALL_UPDATE = 1e-3  # the same ratio, below which a larger learning rate is tried (convention)
LARGE_EPS = 1e-2  # eps of Adam and its variants, whose default is 1e-8 (convention)
HEAVY = 0.95  # momentum: from here on a step accumulates 20 gradients or more (convention)
STEADIER = 0.1  # gain in skill that counts, for control runs with a small change (convention)
SPIKE = 1e3  # largest / first gradient norm, where nothing is learned (convention)
INITIAL_LOSS = 3.0  # first loss / trivial loss, only together with large weights (convention)
LOUD = 5.0  # first / trivial loss of logits, from which recovery takes long (convention)
SOLVED = 0.95  # training accuracy that leaves nothing to improve (convention)
LARGE_WEIGHTS = 2.5  # rms(W) * sqrt(fan_in): He 1.41, Xavier and LeCun 1, PyTorch default 0.58
SMALL_WEIGHTS = 0.25  # lower limit of the same
OUTLIER = 20.0  # factor between a layer's weights and the median layer's
LEARNED = 0.9  # skill relative to a shallow model on the same data (convention)
LIVELY = 0.21  # late decrease of the loss / range of its curve (recordings)
AT_CHANCE = 0.05  # fall below the loss of a constant prediction [share] (convention)
ATTAINABLE = 0.2  # gain in accuracy or R2 that implies a loss below AT_CHANCE [share]
FAR_BEHIND = 0.5  # skill relative to a shallow model on the same data (convention)
STILL = 0.02  # skill, and relative fall of the loss, below which nothing was learned (convention)
RISE = 0.15  # relative rise of the loss above its minimum (convention)
# mean rise per evaluation / loss, late: others <= 0.011, oscillating >= 0.018 (recordings)
SWING = 0.015
FASTER = 1.5  # decrease of the loss in a third of a run / in the third before (convention)
UNDIMINISHED = 0.9  # decrease of the loss in the last third of a run / in the second (convention)
FAR_BELOW = 10.0  # times the first loss, and times 1, below zero (convention)
DIVERGED = 3.0  # late loss / first or trivial loss (convention)
BACK = 0.34  # upward share of the movement of a loss curve: 0.5 is a random walk (recordings)
GAP = 0.1  # train metric minus validation metric (convention)
FLOOR = 0.1  # share of the trivial loss that the output activation makes unreachable (convention)
RESTRAINED = 0.85  # skill below which regularization that measurably acts is blamed
BALANCED = 0.45  # penalty's share of the gradient late in a run: 1/2 at the stationary point
RESTRAINING = 0.6  # penalty's share of the gradient before that point is reached (convention)
DOMINANT = 0.9  # share of the gradient that comes from the penalty (convention)
NARROW = 1e-3  # diversity below which all samples get the same output (measured: faulty 3e-4)

# weight factor rms(W) * sqrt(fan) that preserves the signal's variance through an activation
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

HARDLY = 0.3  # skill below which a run with a falling loss has not begun to learn (convention)

MOVED_STATISTICS = 30  # steps after which running statistics (momentum 0.1) have adapted
EXCESS = 0.2  # loss in evaluation minus in training mode / trivial loss (convention)
FEW_PASS = 0.8  # dropout rate that leaves little more than noise (convention)
FREED = 0.3  # gain in skill from training what is frozen or not optimized (convention)

# wiring

# change of an output that should not change / size of the outputs [ratio]: rounding causes up to
# 2e-6, a missing batch_first, a softmax over rows or a missing mask 0.1 and more
APART = 1e-3
# initial entropy of attention / entropy of uniform attention [share]: scores scaled by
# 1/sqrt(size) leave 0.9 and more, unscaled ones of size 64 less than 0.5 (twins)
FOCUSED = 0.6
# change of the loss gradient at other rows / at the row whose target changed [ratio]: 0 for means
# over rows, 1/rows for roots of means, 1 for broadcast shapes (twins)
PULL = 0.5
# spread of a sampling network's reconstructions / of its inputs [ratio]: collapsed codes leave
# 0.08 and less, trained ones 0.65 and more (twins)
GIVEN_BACK = 0.2
# spread of embeddings after / before training [ratio]: collapsed ones leave 0.13 and less, trained
# ones 0.25 and more (twins)
COLLAPSED = 0.15
LONG = 100  # steps after which a latent code should carry information (convention)
# change of an output when padding is cut off / size of the outputs [ratio]: 1e-6 with a mask, 0.1
# and more for a mean over padding (twins)
PADDED = 0.02
# differences of adjacent lines read as channels last / as given [ratio]: images 1.4 to 2.4, images
# with mixed axes 0.1 to 0.4, noise 1 (digits, photographs)
SMOOTHER = 0.5
BETWEEN = 8.0  # variance of batch means / that of shuffled batches: with 8 means below 3 (theory)
UNHEARD = 0.5  # rows whose targets do not affect the gradient [share] (convention)
ALWAYS = 0.98  # rows with the same prediction, for it to count as constant [share] (convention)
MASKED = 0.8  # entries of a mean that a mask has zeroed: steps are 5 times smaller (convention)
UNLIFTED = 0.05  # rows whose true class has a logit clamped to 0 by a ReLU [share] (convention)
PADDING = 0.2  # padded positions [share] (convention)
# non-linearity of the network / spread of its outputs [ratio]: linear 1e-6, one ReLU 0.1
BENT = 1e-3
# agreement with held-out targets [standard deviations under shuffled targets]: by chance the
# maximum of four tests stays below 3 in 99 of 100 draws (convention)
RELATED = 3.0
RELATED_ROWS = 200  # [rows] below which only unusually strong relations are significant
ADVANTAGE = 0.05  # final loss on shuffled minus true targets / trivial loss (convention)
RARE_ROWS = 50  # of other classes than the commonest, below which a relation may stay unseen
OUTWEIGHING = 0.97  # share of the loss that one class of fewer rows makes by its weight [share]
ABOVE_CONSTANT = (
    0.1  # excess over a constant's loss that noise does not explain [share] (convention)
)
MAJORITY = 0.75  # share of the majority class that can explain an accuracy [share] (convention)
RARER = 2.0  # commonest / rarest class share [ratio] (convention)
COUNTED_LESS = 1.5  # class weight of the commonest / of the rarest [ratio] (convention)
SHIFT = 1.0  # distance of validation from training inputs [standard deviations] (convention)
MOST_LEFT_OUT = 0.5  # ignored pixels, where class 0 never occurs [share]
UNTOLD = 0.1  # of a part of the loss, gained by the order of its targets [share] (convention)
TOLD = 0.05  # the same for another part of the loss, at least (convention)
TOLD_MORE = 5.0  # gain of the other part / of the first (convention)
ROW_BESIDE = 0.3  # variance explained by the next row, none by its own [share] (convention)
MOST_STILL = 0.5  # constant input columns, where the others explain little [share] (convention)
LITTLE = 0.1  # variance that shallow models explain on held-out rows [share] (convention)
DROWNED = 300.0  # slope of the loss at one target column / at another [ratio] (convention)
RIGHT_COSTS = 0.1  # loss of correct outputs: 0, or log k where shares of k are normalised (theory)
PART_SUM = 0.2  # of the loss that is a sum while the rest is a mean [share]: else 0 (theory)
TARGETS_MOVED = 2.0  # change of the mean target over epochs [standard deviations]: else 0 (twins)
MOVED = 0.2  # pairs whose target map fits only when turned, of those that fit at all (convention)
UNKNOWN = 0.25  # rows whose target costs more than another row's [share] (convention)
ONE_SIGN = 0.3  # units that are on for some rows and off for others [share] (convention)
OFFSET = 30.0  # rms / standard deviation of the inputs: pixels 2, calendar years 100 (convention)
STRETCH = 3.0  # standard deviation, validation / training, or its inverse [ratio] (convention)
CLASS_SHIFT = 0.3  # total variation of class shares, training / validation [share] (convention)
SQUEEZED = 0.2  # input columns whose deviation stems from a few outliers [share] (convention)
DOUBLES = 0.2  # validation rows found in training, beyond the rate of repeats in training [share]
MAPPED = 0.3  # validation rows predicted right after renumbering the classes [share] (convention)
REPEATED = 0.1  # training rows that occur twice, as when rare classes are oversampled (convention)
FITS = 0.25  # accuracy above the majority's share, or correlation, of a relation (convention)
HARDLY_FITS = 0.12  # the same, where validation has a relation of its own and not this one
COPIES = 0.5  # validation rows that are near copies of training rows [share] (convention)
RIMS = 0.25  # one-pixel borders between non-adjacent class indices: clean masks have 0.03 [share]
DRAWN = 0.1  # rows that a sampler can draw [share] (convention)
SORTED = 0.6  # classes in a batch / classes expected in a shuffled one [ratio] (convention)
WORSE = 1.0  # R2 at the start minus at the end, while the loss fell [variances] (convention)
FEW_VALUES = 4  # values per batch-norm statistic [rows x pixels]: standard deviation known to 40 %
STUCK = 0.5  # weights with a gradient that a step does not change [share] (convention)
BENDS = 0.05  # variance explained by non-linear features beyond linear ones [share] (convention)
CODED = 0.3  # variance explained by means of categories beyond a model [share] (convention)
BY_CLASS = 0.15  # accuracy of classification minus rounded regression [share] (convention)
TURN = 3.0  # unexplained variance of an angle / of its cosine and sine [ratio] (convention)
OWN_GAIN = 0.05  # share of the trivial loss that a shallow reference model must save (convention)
WEAK = 0.02  # skill of a shallow model that counts as a ceiling if it is significant


@dataclass(frozen=True)
class Measure:
    """Unit and healthy range of one number of evidence."""

    unit: str
    low: float | None = None
    high: float | None = None


# control runs, named after what they change
CONTROLLED = (
    "calmer steadier faster undropped undecayed leaky scaled unhooked bared skipped unfrozen "
    "shifted"
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
    "swing": Measure("rise per evaluation / loss", None, SWING),
    "climb": Measure("late loss / its start or a constant's", None, DIVERGED),
    **dict.fromkeys(CONTROLLED, Measure("skill (0 = constant prediction, 1 = shallow model)")),
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
    "constant": Measure("loss of a constant prediction"),
    "learned": Measure("skill (0 = constant prediction, 1 = shallow model)", LEARNED, None),
    "penalty_share": Measure("share of the gradient", None, RESTRAINING),
    "weight_decay": Measure("of the optimizer"),
    "dropout": Measure("share of units dropped", 0.0, 0.9),
    "rate": Measure("share of units dropped", 0.0, 0.9),
    "width": Measure("units"),
    "tensors": Measure("tensors", None, 0),
    "parameters": Measure("parameter tensors"),
    "rms": Measure("root mean square", 0.01, 10.0),
    "offset": Measure("root mean square / standard deviation", None, OFFSET),
    "batch_size": Measure("rows", 2, None),
    "train_mode_loss": Measure("loss"),
    "eval_mode_loss": Measure("loss"),
    "entropy": Measure("share of uniform attention", 0.1, None),
    "entropy_divided": Measure("share of uniform attention", FOCUSED, None),
    "size": Measure("numbers in a query"),
    "scale": Measure("last / first loss scale", 1 / 1024, 1024),
    "inits": Measure("draws of the weights", None, 0),
    "pull_on_others": Measure("gradient at other rows / at the own row", None, PULL),
    "order_of_rows": Measure("change of outputs / outputs", None, APART),
    "masked": Measure("share of what is averaged", None, MASKED),
    "unheard": Measure("share of rows", None, UNHEARD),
    "box_beaten": Measure("share of rows", None, UNKNOWN),
    "answered": Measure("share of rows predicted as the majority class"),
    "between": Measure("variance of the means of batches / expected one", None, BETWEEN),
    "pulls_away": Measure("share of rows whose output is pulled away from the target", None, 0.9),
    "padding_apart": Measure("change of outputs without padding / outputs", None, PADDED),
    "padding": Measure("share of positions"),
    "nearer": Measure("deviations of the mean", None, 5.0),
    "rows_apart": Measure("change of outputs / outputs", None, APART),
    "future_apart": Measure("change of outputs / outputs", None, APART),
    "slope_seen": Measure("slope of the loss in its gradient / measured", 0.05, None),
    "given_back": Measure("spread of outputs / spread of inputs", GIVEN_BACK, None),
    "embeddings_left": Measure("spread of embeddings, late / first", COLLAPSED, None),
    "only_step": Measure("step of the inputs"),
    "input_length": Measure("steps of the inputs"),
    "unread": Measure("share of the entries of a row", None, 0),
    "inputs": Measure("tensors"),
    "target_given": Measure("change of outputs / outputs", None, APART),
    "order_apart": Measure("change of outputs / outputs", APART, None),
    "eval_spread": Measure("change of outputs / outputs", None, APART),
    "bend": Measure("non-linearity / spread of outputs", BENT, None),
    "target_low": Measure("target"),
    "target_high": Measure("target"),
    "log_sum": Measure("largest |log of the sum of probabilities|", None, 1e-3),
    "ones_in_a_row": Measure("classes per row", None, 1.0),
    "class_gain": Measure("accuracy by classes minus by rounding", None, BY_CLASS),
    "relation": Measure("standard deviations under shuffled targets", RELATED, None),
    "advantage": Measure("loss on shuffled minus on true targets / trivial loss", ADVANTAGE, None),
    "related_rows": Measure("rows"),
    "lines": Measure("change between adjacent lines / standard deviation"),
    "lines_read": Measure("the same with channels last / standard deviation"),
    "constant_columns": Measure("share of input columns", None, 0.9),
    "drift": Measure("standard deviation of inputs, late / first", 1 / STRETCH, STRETCH),
    "summed": Measure("share of the loss that grows with the batch", None, PART_SUM),
    "left_out": Measure("share of the pixels", None, MOST_LEFT_OUT),
    "row_beside": Measure("share of the variance, held out", None, ROW_BESIDE),
    "column_pull": Measure("slope at one column of targets / at another", None, DROWNED),
    "targets_moved": Measure(
        "standard deviations of the targets, last minus first epoch", None, TARGETS_MOVED
    ),
    "turn": Measure("unexplained variance, number / cosine and sine", None, TURN),
    "squeezed": Measure("share of input columns", None, SQUEEZED),
    "columns": Measure("input columns", None, 0),
    "majority": Measure("share of rows", None, MAJORITY),
    "loss_share": Measure("share of the loss at outputs of zero", None, OUTWEIGHING),
    "counted_less": Measure("weight of the commonest class / of the rarest", None, COUNTED_LESS),
    "accuracy": Measure("share of rows"),
    "valid_shift": Measure("standard deviations of training inputs", None, SHIFT),
    "valid_scale": Measure("standard deviation, validation / training", 1 / STRETCH, STRETCH),
    "class_shift": Measure("total variation of class shares", None, CLASS_SHIFT),
    "new_classes": Measure("classes", None, 0),
    "valid_right": Measure("share of validation rows"),
    "valid_mapped": Measure("share of validation rows"),
    "fits_train": Measure("accuracy above the majority's share, or correlation"),
    "fits_valid": Measure("accuracy above the majority's share, or correlation"),
    "rims": Measure("share of the borders of non-adjacent classes", None, RIMS),
    "drawable": Measure("rows"),
    "period": Measure("rows"),
    "rows_in_both": Measure("share of validation rows", None, DOUBLES),
    "classes_in_batch": Measure("classes per batch"),
    "classes_in_all": Measure("classes"),
    "norm_values": Measure("values per channel in a batch", FEW_VALUES + 1, None),
    "stuck": Measure("share of weights with a gradient", None, STUCK),
    "explained_bent": Measure("share of the variance, held out"),
    "explained_by_category": Measure("share of the variance, held out"),
    "explained_straight": Measure("share of the variance, held out"),
    "silent_classes": Measure("classes", None, 0),
    "smallest": Measure("argument of the function"),
    "layers": Measure("layers with weights"),
    "made": Measure("trainable tensors per forward pass", None, 0),
    "loss": Measure("loss"),
    "r2_at_start": Measure("share of the variance explained"),
    "r2": Measure("share of the variance explained", 0.0, None),
}
