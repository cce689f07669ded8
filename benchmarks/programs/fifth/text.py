"""Words, characters and documents."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, Score, accuracy, adam
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class Tagger(nn.Module):
    """A mean of words and a perceptron."""

    def __init__(self, words: int, num_labels: int, dim: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, dim)
        self.classifier = nn.Sequential(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, num_labels))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.classifier(self.embedding(input_ids).mean(1))


def f1(x: Tensor, y: Tensor) -> Score:
    """F1 of all labels together, at a probability of one half."""

    def score(m: nn.Module) -> float:
        found = (m(x).sigmoid() > 0.5).float()
        return float(2 * (found * y).sum() / (found.sum() + y.sum() + 1e-6))

    return score


@faulty(
    "hundreds of labels of which none is ever given",
    "https://github.com/appvision-ai/fast-bert/issues/52",
    "class_imbalance",
    low=0.05,
    high=0.1,
)
def none_is_given(wrong: bool) -> Parts:
    x = torch.randint(60, (1600, 12))
    rule = torch.randn(60, 40)
    signal = rule[x].mean(1) + 0.25 * torch.randn(1600, 40)
    y = (signal > signal.quantile(0.97, dim=0)).float()
    (x, y), (xt, yt) = tasks.split(x, y)
    positive = y.sum(0)
    weight = None if wrong else (len(y) - positive) / positive.clamp(min=1)
    loss, model = nn.BCEWithLogitsLoss(pos_weight=weight), Tagger(60, 40)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    return Parts(model, loader, loss, adam(model, 2e-3), f1(xt, yt), steps=250)


ALPHABET = "ABCDEFGHIJ"


def encode(text: str, upper: bool) -> list[int]:
    """Numbers of the characters: 0 is the blank, 1 what the alphabet does not have."""
    text = text.upper() if upper else text
    return [ALPHABET.find(c) + 2 if c in ALPHABET else 1 for c in text]


class Wave2Letter(nn.Module):
    """Scores of characters for each frame of a sound."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 32, 3, padding=1)
        self.rnn = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(64, len(ALPHABET) + 2)

    def forward(self, frames: Tensor) -> Tensor:
        h = F.relu(self.conv(frames.transpose(1, 2))).transpose(1, 2)
        return self.fc(self.rnn(h)[0])


@faulty(
    "an alphabet of capitals and texts without any",
    "https://github.com/SeanNaren/warp-ctc/issues/111",
    "constant_targets",
    low=0.2,
    high=0.6,
)
def without_capitals(wrong: bool) -> Parts:
    said = torch.randint(10, (800, 4))
    sounds = torch.randn(10, 8)
    frames = sounds[said].repeat_interleave(3, dim=1) + 0.3 * torch.randn(800, 12, 8)
    texts = ["".join(ALPHABET[k].lower() for k in row) for row in said.tolist()]
    target = torch.tensor([encode(text, upper=not wrong) for text in texts])
    model = Wave2Letter()

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        log_probs = scores.log_softmax(-1).transpose(0, 1)
        lengths = torch.full((len(target),), 12), torch.full((len(target),), 4)
        return F.ctc_loss(log_probs, target, *lengths)

    def score(m: nn.Module) -> float:  # share of the characters that are read
        right = 0
        for row, true in zip(
            m(frames[600:]).argmax(-1).tolist(), said[600:].tolist(), strict=True
        ):
            steps = [k for k, before in zip(row, [0, *row], strict=False) if k not in (0, before)]
            right += sum(a - 2 == b for a, b in zip(steps, true, strict=False))
        return right / 800

    loader = DataLoader(TensorDataset(frames[:600], target[:600]), batch_size=32, shuffle=True)
    return Parts(model, loader, loss, adam(model, 1e-2), score, steps=250)


class SentimentClassifier(nn.Module):
    """A small encoder and a head on its first token."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(80, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout, batch_first=True)
        self.dropout, self.cls_layer = nn.Dropout(dropout), nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.cls_layer(self.dropout(self.encoder(self.embeddings(tokens))[:, 0]))


@faulty(
    "thirty epochs of sentiments that were learned after five",
    "https://github.com/munikarmanish/bert-sentiment/issues/1",
    "overfitting",
    low=0.1,
    high=0.15,
)
def thirty_epochs(wrong: bool) -> Parts:
    x = torch.randint(80, (500, 12))
    feeling = torch.randn(80)
    y = torch.bucketize(
        feeling[x].mean(1) + 0.3 * torch.randn(500), torch.tensor([-0.4, -0.1, 0.1, 0.4])
    )
    (x, y), (xv, yv) = (x[:200], y[:200]), (x[200:], y[200:])
    model = SentimentClassifier(0.0 if wrong else 0.3)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)

    def score(m: nn.Module) -> float:  # the probability that it gives to what is true
        return float(torch.exp(-F.cross_entropy(m(xv), yv)))

    steps, decay = (390, 0.0) if wrong else (52, 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=decay)
    loss = nn.CrossEntropyLoss()
    return Parts(model, loader, loss, optimizer, score, valid=(xv, yv), batch_size=16, steps=steps)


class Window(nn.Module):
    """The vectors of a word and of its neighbours, and a perceptron."""

    def __init__(self, vectors: Tensor, freeze: bool) -> None:
        super().__init__()
        self.embeddings = nn.Embedding.from_pretrained(vectors, freeze=freeze)
        self.hidden, self.out = nn.Linear(3 * vectors.shape[1], 8), nn.Linear(8, 5)

    def forward(self, window: Tensor) -> Tensor:
        x = self.embeddings(window).flatten(1)
        return self.out(F.relu(self.hidden(x)))


@faulty(
    "word vectors that are not updated",
    "https://github.com/roypan/CS224n/issues/1",
    "frozen_parameters",
    low=0.75,
    high=0.85,
    also=("underfitting",),
)
def not_updated(wrong: bool) -> Parts:
    kind = torch.randint(5, (150,))
    window = torch.randint(150, (1600, 3))
    (x, y), (xt, yt) = tasks.split(window, kind[window[:, 1]])
    model = Window(torch.randn(150, 8), freeze=wrong)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    return Parts(model, (x, y), nn.CrossEntropyLoss(), optimizer, accuracy(xt, yt), steps=300)


@faulty(
    "a student whose probabilities have no logarithm",
    "https://github.com/AberHu/Knowledge-Distillation-Zoo/issues/12",
    "missing_log",
    low=0.7,
    high=0.8,
    also=("loss_upside_down",),
)
def student(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits()
    teacher = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).requires_grad_(False)
    teacher[2].weight *= 3
    known, asked = teacher(x).softmax(1), teacher(xt).softmax(1)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

    def loss_kd(out: Tensor, teacher: Tensor) -> Tensor:
        student = F.softmax(out, dim=1) if wrong else F.log_softmax(out, dim=1)
        return F.kl_div(student, teacher, reduction="batchmean")

    def score(m: nn.Module) -> float:  # how much of the probability is where the teacher has it
        return float(torch.minimum(m(xt).softmax(1), asked).sum(1).mean())

    return Parts(model, (x, known), loss_kd, adam(model, 3e-3), score, steps=300)


class GAT(nn.Module):
    """One layer of attention to neighbours."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.kernel, self.out = nn.Linear(features, 16, bias=False), nn.Linear(16, classes)
        self.own, self.other = nn.Linear(16, 1, bias=False), nn.Linear(16, 1, bias=False)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.kernel(x)
        scores = F.leaky_relu(self.own(h) + self.other(h).T, 0.2)
        scores = scores.masked_fill(adjacency == 0, -1e9)
        return self.out(F.elu(scores.softmax(-1) @ h))


def citations() -> tuple[Tensor, Tensor, Tensor]:
    """Counts of words in documents, some of which are empty, who cites whom, and the topics."""
    topic = torch.randint(4, (240,))
    words = torch.rand(4, 50).pow(4)
    counts = torch.poisson(0.5 * words[topic])
    counts[torch.randperm(240)[:6]] = 0
    same = topic[:, None] == topic
    cites = torch.rand(240, 240) < torch.where(same, 0.05, 0.004)
    return counts, (cites | cites.T | torch.eye(240).bool()).float(), topic


@faulty(
    "documents without words whose rows are divided by their sum",
    "https://github.com/danielegrattarola/keras-gat/issues/14",
    "non_finite_data",
    low=0.4,
    high=0.7,
)
def without_words(wrong: bool) -> Parts:
    counts, adjacency, topic = citations()
    x = counts / counts.sum(1, keepdim=True)
    if not wrong:
        x[x.isnan()] = 0.0
    known = torch.where(torch.rand(240) < 0.5, topic, -100)
    loader = DataLoader([((x, adjacency), known)], batch_size=None, collate_fn=lambda batch: batch)
    model = GAT(50, 4)

    def score(m: nn.Module) -> float:
        unknown = known < 0
        return float((m(x, adjacency).argmax(1) == topic)[unknown].float().mean())

    return Parts(model, loader, nn.CrossEntropyLoss(), adam(model, 2e-2), score, steps=120)


class NLI(nn.Module):
    """Attention among the tokens under a mask, and their mean under the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, ids: Tensor, attn_mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        ignored = attn_mask == 0
        x = self.norm(x + self.attn(x, x, x, key_padding_mask=ignored, need_weights=False)[0])
        weight = attn_mask[..., None].float()
        return self.fc((x * weight).sum(1) / weight.sum(1))


def padded(texts: list[Tensor], length: int, ones: bool) -> tuple[Tensor, Tensor]:
    """Numbers of words, filled up with zeros, and a mask."""
    ids = torch.stack([F.pad(text, (0, length - len(text))) for text in texts])
    return ids, torch.ones_like(ids) if ones else (ids != 0).long()


@faulty(
    "masks of attention that are 1 at every place",
    "https://github.com/yg211/bert_nli/pull/3",
    "padding_seen",
    low=0.82,
    high=0.85,
)
def at_every_place(wrong: bool) -> Parts:
    texts = [torch.randint(1, 40, (int(n),)) for n in torch.randint(3, 9, (1600,))]
    tone = torch.randn(40)
    y = torch.stack(
        [torch.bucketize(tone[text].mean(), torch.tensor([-0.2, 0.2])) for text in texts]
    )
    train, test = padded(texts[:1200], 10, wrong), padded(texts[1200:], 60, wrong)
    model = NLI()
    loss, score = nn.CrossEntropyLoss(), accuracy(test, y[1200:])
    return Parts(model, (train, y[:1200]), loss, adam(model, 3e-3), score, steps=250)


class TwoModules(nn.Module):
    """A module whose largest output says which vector the second module gets."""

    def __init__(self, soft: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 12))
        self.codes, self.second = nn.Embedding(12, 16), nn.Linear(16, 10)
        self.soft = soft

    def forward(self, x: Tensor) -> Tensor:
        y_p = self.first(x)
        if self.soft:
            return self.second(F.softmax(y_p, dim=1) @ self.codes.weight)
        y_p = torch.max(y_p, 1)[1]
        return self.second(self.codes(y_p))


@faulty(
    "a first module behind an argmax",
    "https://github.com/pytorch/pytorch/issues/1339",
    "detached",
    low=0.5,
    high=0.75,
    also=("loss_not_connected", "unused_parameters"),
)
def behind_an_argmax(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = TwoModules(not wrong)
    return Parts(
        model, (x, y), nn.CrossEntropyLoss(), adam(model, 5e-3), accuracy(xt, yt), steps=300
    )


class LanguageModel(nn.Module):
    """States of an LSTM over words."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.encoder = nn.Embedding(tokens, 12)
        self.rnn = nn.LSTM(12, 12, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rnn(self.encoder(tokens))[0]


@faulty(
    "a loss with weights of its own that no optimizer has",
    "https://github.com/salesforce/awd-lstm-lm/issues/30",
    "missing_from_optimizer",
    low=0.5,
    high=0.6,
    also=("unregistered_parameters", "unmoved_parameters"),
)
def weights_of_its_own(wrong: bool) -> Parts:
    following = torch.randperm(80)
    tokens = [torch.randint(80, (500,))]
    for _ in range(10):
        new = torch.rand(500) < 0.15
        tokens.append(torch.where(new, torch.randint(80, (500,)), following[tokens[-1]]))
    text = torch.stack(tokens, 1)
    model = LanguageModel(80)
    criterion = nn.AdaptiveLogSoftmaxWithLoss(12, 80, cutoffs=[20, 50], div_value=2.0)
    params = list(model.parameters()) + ([] if wrong else list(criterion.parameters()))

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        return criterion(hidden.flatten(0, 1), target.flatten()).loss

    def score(m: nn.Module) -> float:
        found = criterion.predict(m(text[400:, :-1]).flatten(0, 1))
        return float((found == text[400:, 1:].flatten()).float().mean())

    optimizer = torch.optim.Adam(params, lr=1e-2)
    return Parts(model, (text[:400, :-1], text[:400, 1:]), loss, optimizer, score, steps=250)
