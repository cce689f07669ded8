import pytest
import scipy
import torch
from torch import nn

from tikhon import layers


class Everything(nn.Module):
    """Attention, a recurrent stack, stochastic depth, dropout and batch statistics."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.rnn = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True)
        self.path = layers.DropPath(0.2)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Dropout(0.4), nn.Linear(8, 3))

    def forward(self, x):
        x = self.encoder(x)
        x = x + self.path(self.rnn(x)[0])
        return self.head(self.norm(x[:, -1]))


def inputs(rows=6):
    return torch.randn(rows, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("replaced", [False, True])
def test_every_source_is_on_and_batch_statistics_do_not_move(replaced):
    torch.manual_seed(0)
    model, x = Everything().eval(), inputs()
    if replaced:
        layers.replace_dropout(model)
    statistics = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        expected = model(x)
        with layers.montecarlo(model):
            assert not model.norm.training
            spread = torch.stack([model(x) for _ in range(8)]).std(0)
        for source in layers.audit(model):  # each of them alone makes a difference
            alone = Everything()
            if replaced:
                layers.replace_dropout(alone)
            alone.load_state_dict(model.state_dict())
            alone.eval().get_submodule(source.path).training = True
            if source.path.startswith("encoder"):
                alone.encoder.training = True
            assert not torch.allclose(alone(x), alone.eval()(x)), source.path
        assert torch.equal(model(x), expected)
    assert (spread > 0).all()
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, statistics[k]) for k, v in model.state_dict().items())


@torch.no_grad()  # where torch's encoder would take its shortcut past the noise
def test_montecarlo_is_training_mode_where_there_is_nothing_else():
    torch.manual_seed(0)
    model, x = Everything(), inputs()
    model.norm = nn.Identity()
    torch.manual_seed(1)
    trained = model(x)
    model.eval()
    with layers.montecarlo(model):
        torch.manual_seed(1)
        assert torch.equal(model(x), trained)


def test_modes_are_restored_after_an_error():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).eval()
    with pytest.raises(KeyError), layers.montecarlo(model):
        raise KeyError
    assert not any(m.training for m in model.modules())


def test_samples_as_rows_have_the_distribution_of_a_loop():
    torch.manual_seed(0)
    model, x = Everything(), inputs(3)
    drawn = layers.predict_distribution(model, x, samples=600, chunk=700)
    assert drawn.samples.shape == (600, 3, 3)
    with torch.no_grad(), layers.montecarlo(model):
        loop = torch.stack([model(x).softmax(-1) for _ in range(600)])
    error = (drawn.mean - loop.mean(0)).abs()
    assert (error <= 4.9 * (drawn.variance / 600 + loop.var(0) / 600).sqrt()).all()
    ratio = drawn.variance / loop.var(0)
    assert (ratio > 0.6).all() and (ratio < 1.6).all()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: layers.DropConnect(nn.Linear(4, 3), 0.5),
        lambda: nn.Sequential(nn.Linear(4, 3), layers.DropPath(0.5, mode="batch")),
        lambda: nn.Sequential(nn.Linear(4, 3), layers.Dropout(0.5, tied=(0,))),
    ],
    ids=["weights", "batch", "tied"],
)
def test_noise_that_a_batch_shares_still_differs_between_samples(wrap):
    torch.manual_seed(0)
    model, x = wrap(), torch.ones(2, 4)
    drawn = layers.predict_distribution(model, x, samples=300, output="values", chunk=64)
    assert drawn.samples.shape == (300, 2, 3)
    assert torch.allclose(drawn.samples[:, 0], drawn.samples[:, 1])  # one draw a batch
    assert drawn.samples.unique(dim=0).shape[0] > 1
    expected = model.eval()(x)
    assert ((drawn.mean - expected).abs() <= 4.9 * (drawn.variance / 300).sqrt() + 1e-6).all()


def test_weight_dropped_recurrence_is_predicted_too():
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layers.WeightDrop(nn.LSTM(4, 3, batch_first=True), 0.5)

        def forward(self, x):
            return self.rnn(x)[0][:, -1]

    drawn = layers.predict_distribution(Last(), torch.ones(2, 5, 4), samples=20)
    assert drawn.samples.unique(dim=0).shape[0] == 20


def test_entropies_are_those_of_their_definitions():
    samples = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
    spread = layers.Distribution(samples, classes=True)
    log2 = torch.tensor(2.0).log()
    torch.testing.assert_close(spread.entropy, torch.stack([log2, log2]))
    torch.testing.assert_close(spread.mutual_information, torch.stack([log2, log2 * 0]))
    torch.testing.assert_close(spread.variance, torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="a regression has no entropy"):
        layers.Distribution(samples, classes=False).entropy


@pytest.mark.slow  # the import of torchmetrics takes seconds; two bins are checked by hand below
def test_calibration_error_equals_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional", reason="pip install torchmetrics")
    generator = torch.Generator().manual_seed(0)
    for bins in (5, 15):
        probabilities = torch.randn(500, 4, generator=generator).softmax(-1)
        labels = torch.randint(4, (500,), generator=generator)
        theirs = metrics.calibration_error(
            probabilities, labels, task="multiclass", num_classes=4, n_bins=bins
        )
        ours = layers.expected_calibration_error(probabilities, labels, bins=bins)
        assert ours == pytest.approx(theirs.item(), abs=1e-6)


def test_neighbouring_bins_do_not_hide_each_other():
    probabilities = torch.tensor([[0.75, 0.25], [0.95, 0.05]])  # right, then wrong: 0.25 and -0.95
    error = layers.expected_calibration_error(probabilities, torch.tensor([0, 1]), bins=5)
    assert error == pytest.approx((0.25 + 0.95) / 2)


def test_rejecting_by_a_perfect_score_leaves_the_right_ones():
    correct = torch.tensor([1, 0, 1, 1, 0])
    _, accuracy = layers.accuracy_rejection(1.0 - correct, correct, torch.tensor([0.0, 0.4]))
    torch.testing.assert_close(accuracy, torch.tensor([0.6, 1.0]))


def test_bad_requests_are_refused():
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    with pytest.raises(ValueError, match="no source of noise"):
        layers.predict_distribution(model, x)
    with (
        pytest.raises(ValueError, match="unknown module 'fc'"),
        layers.montecarlo(model, also=("fc",)),
    ):
        pass
    model.append(nn.Dropout(0.5))
    with pytest.raises(ValueError, match="unknown output 'logit'; did you mean 'logits'"):
        layers.predict_distribution(model, x, output="logit")
    with pytest.raises(ValueError, match="at least 2, received 1"):
        layers.predict_distribution(model, x, samples=1)
    with pytest.raises(ValueError, match=r"probabilities \(2, 2\) and labels \(1,\)"):
        layers.expected_calibration_error(torch.ones(2, 2), torch.ones(1))


def test_noise_without_a_trace_is_named():
    class Hidden(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, self.training)

    model = nn.Sequential(Hidden()).eval()
    with layers.montecarlo(model, also=("0",)):
        assert (model(torch.ones(99)) == 0).any()
    alone = Hidden().eval()
    with layers.montecarlo(alone, also=("",)):  # the model itself, as for get_submodule("")
        assert (alone(torch.ones(99)) == 0).any()
    drawn = layers.predict_distribution(alone, torch.ones(1, 99), samples=9, also=("",))
    assert len(drawn.samples.unique(dim=0)) == 9


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["rows", "weights"])
def test_a_loader_gives_the_rows_in_order(labelled, shared):
    torch.manual_seed(0)
    noise = layers.DropConnect(nn.Linear(4, 3), 0.5) if shared else nn.Linear(4, 3)
    model = nn.Sequential(noise, layers.Dropout(0.5))
    x, y = torch.randn(10, 4), torch.arange(10)
    data = torch.utils.data.TensorDataset(x, y) if labelled else x
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    drawn = layers.predict_distribution(model, loader, samples=2000, output="values")
    assert drawn.samples.shape == (2000, 10, 3)
    expected = model.eval()(x)
    assert ((drawn.mean - expected).abs() <= 4.9 * (drawn.variance / 2000).sqrt() + 1e-6).all()
    torch.manual_seed(1)
    one_batch = [(x, y)] if labelled else [x]
    found = layers.predict_distribution(model, one_batch, samples=3).samples
    torch.manual_seed(1)
    assert torch.equal(found, layers.predict_distribution(model, x, samples=3).samples)


def test_inputs_of_another_kind_are_refused():
    model, x = nn.Sequential(nn.Dropout(0.5)), torch.ones(2, 3)
    with pytest.raises(TypeError, match="received a tuple: give the inputs alone"):
        layers.predict_distribution(model, (x, x))
    with pytest.raises(TypeError, match="received a batch of dict"):
        layers.predict_distribution(model, [{"x": x}])
    with pytest.raises(ValueError, match="no batch"):
        layers.predict_distribution(model, [])


def overconfident(rows=400):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return logits * 4, labels  # the labels follow the logits at temperature 4


def test_the_temperature_has_the_lowest_loss():
    logits, labels = overconfident()
    found = layers.fit_temperature(logits, labels)

    def loss(inverse):
        return nn.functional.cross_entropy(logits.double() * inverse, labels).item()

    reference = scipy.optimize.minimize_scalar(loss, bounds=(1e-3, 1e2), method="bounded",
                                               options={"xatol": 1e-10})  # fmt: skip
    assert found == pytest.approx(1 / reference.x, rel=1e-5)
    assert found == pytest.approx(4, rel=0.2)
    for scale in (1e-6, 1e6):  # the temperature has the unit of the logits
        scaled = layers.fit_temperature(logits.double() * scale, labels)
        assert scaled == pytest.approx(found * scale, rel=1e-6)


def test_one_logit_is_the_logit_of_class_one():
    logits, labels = overconfident()
    two, labels = logits[labels < 2][:, :2], labels[labels < 2]
    expected = layers.fit_temperature(two, labels)
    for single in (two[:, 1] - two[:, 0], two[:, 1:] - two[:, :1]):
        assert layers.fit_temperature(single, labels) == pytest.approx(expected)


@pytest.mark.parametrize("form", ["pair", "loader"])
def test_temperature_scaling_calibrates_and_leaves_the_model(form):
    logits, labels = overconfident(800)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3, affine=False)).train()
    model[1].running_var.fill_(1 - model[1].eps)
    data = (logits[:400], labels[:400])
    if form == "loader":
        rows = torch.utils.data.TensorDataset(*data)
        data = torch.utils.data.DataLoader(rows, batch_size=64, shuffle=True)
    scaled = layers.scale_temperature(model, data)
    assert all(module.training for module in model.modules())
    assert scaled.temperature.item() == pytest.approx(
        layers.fit_temperature(logits[:400], labels[:400]), rel=1e-4
    )
    scaled.eval()
    errors = [
        layers.expected_calibration_error(m(logits[400:]).softmax(1), labels[400:])
        for m in (model, scaled)
    ]
    assert errors[1] < 0.5 * errors[0]
    again = layers.TemperatureScaled(nn.Sequential(*model))
    again.load_state_dict(scaled.state_dict())
    assert torch.equal(again.eval()(logits), scaled(logits))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[2.0, 0.0], [0.0, 1.0]], [0, 1], "every row is right"),
        ([[2.0, 0.0], [0.0, 1.0]], [1, 0], "no higher logits"),
        ([[2.0, 0.0]], [0, 1], "expected logits"),
        ([], [], "expected logits"),
    ],
)
def test_rows_without_a_best_temperature_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        layers.fit_temperature(torch.tensor(logits), torch.tensor(labels))


TINY = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_models_of_transformers_are_as_noisy_as_in_training(kind):
    transformers = pytest.importorskip("transformers", reason="pip install tikhon[hf]")
    options = {"attention_dropout": 0.3} if kind == "Llama" else {}
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(**TINY, **sizes, **options)
    model = getattr(transformers, f"{kind}Model")(config).train()
    ids = torch.arange(10).view(2, 5)
    torch.manual_seed(0)
    trained = model(ids)[0]
    model.eval()
    with layers.montecarlo(model):
        torch.manual_seed(0)
        noisy = model(ids)[0]
    assert torch.equal(noisy, trained)
    assert not torch.equal(noisy, model(ids)[0])


def test_a_temperature_of_a_model_is_asked_of_the_verb_that_takes_one():
    with pytest.raises(TypeError, match=r"received Linear and list; .*scale_temperature"):
        layers.fit_temperature(nn.Linear(2, 2), [])


def test_a_distribution_prints_what_it_is():
    found = layers.Distribution(torch.zeros(5, 60, 2), classes=True)
    assert repr(found) == "Distribution(5 samples of probabilities, shape (60, 2))"


class Single(nn.Module):
    """One logit or probability a row, of class 1."""

    def __init__(self, output, flat):
        super().__init__()
        self.noise, self.fc = layers.Dropout(0.5), nn.Linear(4, 1)
        self.output, self.flat = output, flat

    def forward(self, x):
        z = self.fc(self.noise(x))
        z = z if self.output == "logits" else z.sigmoid()
        return z[:, 0] if self.flat else z


@pytest.mark.parametrize("output", ["logits", "probabilities"])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_number_a_row_is_that_of_class_1(output, flat, rows):
    torch.manual_seed(0)
    model, x = Single(output, flat), torch.randn(rows, 4)
    torch.manual_seed(1)
    spread = layers.predict_distribution(model, x, samples=50, output=output)
    torch.manual_seed(1)
    values = layers.predict_distribution(model, x, samples=50, output="values").samples
    probability = values.reshape(50, rows).double()
    probability = probability.sigmoid() if output == "logits" else probability
    assert spread.samples.shape == (50, rows, 2)
    torch.testing.assert_close(spread.mean[:, 1].double(), probability.mean(0))
    p = probability.mean(0)
    torch.testing.assert_close(spread.entropy.double(), -(p * p.log() + (1 - p) * (1 - p).log()))


@pytest.mark.parametrize("noise", [nn.Dropout(0.5), layers.DropBlock1d(0.5)])
def test_a_model_that_returns_no_tensor_is_refused(noise):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise = noise

        def forward(self, x):
            return {"logits": self.noise(x)}

    with pytest.raises(TypeError, match=r"returns a tensor, received dict from Named.*its logits"):
        layers.predict_distribution(Named(), torch.ones(2, 3, 9), samples=4)


class Segmenter(nn.Module):
    """Logits of three classes for every pixel, or for every token with the classes last."""

    def __init__(self, last):
        super().__init__()
        self.last, self.noise = last, nn.Dropout(0.5)
        self.mix = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        logits = self.mix(self.noise(x))
        return logits.permute(0, 2, 3, 1) if self.last else logits


@pytest.mark.parametrize(("last", "axis"), [(False, 1), (False, -3), (True, -1), (True, 3)])
def test_the_dimension_of_the_classes_is_told_where_there_are_more(last, axis):
    torch.manual_seed(0)
    model, x = Segmenter(last), torch.randn(2, 2, 4, 5)
    where = 3 if last else 1
    with pytest.raises(ValueError, match=r"returns shape .*give axis=1 where.*axis=-1 where"):
        layers.predict_distribution(model, x, samples=4)
    with pytest.raises(ValueError, match=r"not that of the rows, received 0 for shape"):
        layers.predict_distribution(model, x, samples=4, axis=0)
    spread = layers.predict_distribution(model, x, samples=4, axis=axis)
    ones = torch.ones(2, 4, 5)
    torch.testing.assert_close(spread.mean.sum(where), ones)
    assert spread.entropy.shape == ones.shape == spread.mutual_information.shape
    assert (spread.mutual_information >= -1e-6).all()


@pytest.mark.parametrize("where", [1, 3])
def test_calibration_reads_the_dimension_of_the_classes_from_the_labels(where):
    torch.manual_seed(0)
    rows = torch.randn(40, 3)
    labels = torch.where(torch.rand(40) < 0.7, rows.argmax(1), torch.randint(3, (40,)))
    shaped = rows.reshape(2, 4, 5, 3).movedim(3, where)
    of_rows = layers.expected_calibration_error(rows.softmax(1), labels)
    pixels = layers.expected_calibration_error(shaped.softmax(where), labels.reshape(2, 4, 5))
    assert pixels == pytest.approx(of_rows)
    fitted = layers.fit_temperature(shaped, labels.reshape(2, 4, 5))
    assert fitted == pytest.approx(layers.fit_temperature(rows, labels))
    scaled = layers.scale_temperature(nn.Identity(), [(shaped, labels.reshape(2, 4, 5))])
    assert scaled.temperature.item() == pytest.approx(fitted)


def test_one_probability_a_row_is_that_of_class_1():
    p, labels = torch.tensor([0.9, 0.2, 0.6, 0.7]), torch.tensor([1, 0, 0, 1])
    both = layers.expected_calibration_error(torch.stack([1 - p, p], 1), labels)
    assert layers.expected_calibration_error(p, labels) == pytest.approx(both)
    assert layers.expected_calibration_error(p[:, None], labels) == pytest.approx(both)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.tensor([[2.0, -1.0]]), torch.tensor([0]), "logits go through softmax first"),
        (
            torch.tensor([[0.5, 0.5]]),
            torch.tensor([-100]),
            "leave out rows that are to be ignored",
        ),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), "class numbers from 0 to 1, received 2"),
        (torch.full((2, 3, 3), 1 / 3), torch.zeros(2, 3).long(), "either of two dimensions"),
        (torch.tensor([[float("nan"), 0.5]]), torch.tensor([0]), "probabilities must be finite"),
    ],
)
def test_what_is_no_calibration_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        layers.expected_calibration_error(scores, labels)


@pytest.mark.parametrize("also", ["0", ("0",), ["0"]])
def test_one_glob_is_a_pattern_too(also):
    model = nn.Sequential(nn.Linear(2, 2))
    with layers.montecarlo(model, also=also):
        assert model[0].training
    with pytest.raises(TypeError, match="also takes globs"), layers.montecarlo(model, also=3):
        pass
