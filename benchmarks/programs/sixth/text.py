"""Texts, the ends of texts, adapters and models that were trained before."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, accuracy, adam
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)

EOS, PAD = 1, 0


class CausalLM(nn.Module):
    """A GRU that foretells tokens, with the loss of its labels as Hugging Face's models have."""

    def __init__(self, vocab: int, dim: int = 32) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(vocab, dim), nn.GRU(dim, 48, batch_first=True)
        self.lm_head = nn.Linear(48, vocab)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.lm_head(self.rnn(self.embed(input_ids))[0])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that the model computes itself."""
    return model(**batch).loss


def answers(rows: int) -> list[list[int]]:
    """Texts that count on from a number, as many steps as their second token says, and end."""
    first = torch.randint(8, (rows,)).tolist()
    long = torch.randint(1, 6, (rows,)).tolist()
    return [
        [2 + a, 10 + n, *(16 + (a + k) % 8 for k in range(n)), EOS]
        for a, n in zip(first, long, strict=True)
    ]


class Texts(torch.utils.data.Dataset):
    """Texts as dictionaries of tokens and labels."""

    def __init__(self, input_ids: Tensor, labels: Tensor) -> None:
        self.input_ids, self.labels = input_ids, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[k], "labels": self.labels[k]}


def padded(texts: list[list[int]], length: int, pad: int) -> Tensor:
    """Tokens of texts, filled up."""
    return torch.tensor([[*text, *[pad] * (length - len(text))] for text in texts])


@faulty(
    "an end of text that serves as padding, whose labels are masked",
    "https://github.com/huggingface/trl/issues/976",
    "ignored_rows",
    low=0.3,
    high=0.8,
)
def serves_as_padding(wrong: bool) -> Parts:
    texts, held_out = answers(500), answers(200)
    pad_token = EOS if wrong else PAD
    input_ids = padded(texts, 8, pad_token)
    labels = input_ids.masked_fill(input_ids == pad_token, -100)
    model = CausalLM(24)

    def score(m: nn.Module) -> float:  # share of the answers that end where they should
        ids = padded(held_out, 8, EOS)
        said = m(ids).logits.argmax(-1)
        ends = [len(text) - 2 for text in held_out]
        stop = [
            row[end] == EOS and EOS not in row[1:end]
            for row, end in zip(said.tolist(), ends, strict=True)
        ]
        return sum(stop) / len(stop)

    loader = DataLoader(Texts(input_ids, labels), batch_size=32, shuffle=True)
    return Parts(model, loader, own_loss, adam(model, 3e-3), score, steps=250)


@faulty(
    "labels that are the tokens, padding and all",
    "https://github.com/huggingface/trl/pull/1625",
    "padding_in_loss",
    low=0.8,
    high=0.95,
)
def padding_and_all(wrong: bool) -> Parts:
    texts, held_out = answers(500), answers(200)
    input_ids = padded(texts, 40, PAD)
    labels = input_ids.clone()
    if not wrong:
        labels[input_ids == PAD] = -100
    model = CausalLM(24)
    ids = padded(held_out, 40, PAD)

    def score(m: nn.Module) -> float:  # share of the tokens behind the question that are right
        said = m(ids).logits.argmax(-1)[:, 1:-1]
        true = ids[:, 2:]
        return float((said == true)[true != PAD].float().mean())

    loader = DataLoader(Texts(input_ids, labels), batch_size=32, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    return Parts(model, loader, own_loss, optimizer, score, steps=100)


class BitBlock(nn.Module):
    """Attention and a perceptron; what goes past the attention is what came out of it."""

    def __init__(self, dim: int, residual: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.ffn = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        skip = x
        x, _ = self.attn(x, x, x, need_weights=False)
        x = x + (skip if self.residual else x)
        return self.ffn(x) + x


class BitTransformer(nn.Module):
    """Blocks over tokens with learned places, and a tag for each token."""

    def __init__(self, vocab: int, length: int, depth: int, residual: bool) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, 32), nn.Parameter(torch.randn(length, 32))
        self.layers = nn.ModuleList(BitBlock(32, residual) for _ in range(depth))
        self.to_logits = nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens) + self.pos
        for layer in self.layers:
            x = layer(x)
        return self.to_logits(x)


@faulty(
    "a residual that adds what it has to itself",
    "https://github.com/kyegomez/BitNet/issues/32",
    "residual_missing",  # no code says it: nothing goes past the attention
    low=0.7,
    high=0.85,
    also=("vanishing_gradient", "slow_convergence", "underfitting", "poor_init"),
)
def to_itself(wrong: bool) -> Parts:
    x = torch.randint(20, (800, 10))
    left, right = torch.randint(2, (2, 20))
    y = 2 * left[x] + right[x.roll(1, 1)]
    model = BitTransformer(20, 10, 6, residual=not wrong)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    def score(m: nn.Module) -> float:
        return float((m(x[600:]).argmax(-1) == y[600:]).float().mean())

    return Parts(model, (x[:600], y[:600]), loss, adam(model, 1e-3), score, steps=250)


class Reader(nn.Module):
    """One query of attention over a text; what is padding or what is not is left out."""

    def __init__(self, inverted: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.query, self.key = nn.Parameter(torch.randn(24)), nn.Linear(24, 24)
        self.out = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 2))
        self.inverted = inverted

    def forward(self, ids: Tensor, key_padding_mask: Tensor) -> Tensor:
        h = self.embed(ids)
        attn_output_weights = self.key(h) @ self.query / 24**0.5
        left_out = key_padding_mask if self.inverted else key_padding_mask == 0
        attn_output_weights = attn_output_weights.masked_fill(left_out.bool(), float("-inf"))
        return self.out((attn_output_weights.softmax(1)[..., None] * h).sum(1))


@faulty(
    "a mask of padding whose equals zero is missing",
    "https://github.com/mlwithme/TransformerTranslation/issues/6",
    "padding_seen",
    low=0.65,
    high=0.8,
    also=("inputs_ignored",),
)
def equals_zero_is_missing(wrong: bool) -> Parts:
    long = torch.randint(3, 11, (1600,))
    ids = torch.randint(1, 40, (1600, 12))
    mask = (torch.arange(12) < long[:, None]).long()
    tone = torch.randn(40)
    y = ((tone[ids] * mask).sum(1) > 0).long()
    ids = ids * mask
    model, inputs, held_out = Reader(wrong), (ids[:1200], mask[:1200]), (ids[1200:], mask[1200:])
    score = accuracy(held_out, y[1200:])
    return Parts(
        model, (inputs, y[:1200]), nn.CrossEntropyLoss(), adam(model, 3e-3), score, steps=250
    )


class Ordered(nn.Module):
    """A transformer of tokens with sines for places."""

    def __init__(self, by_row: bool) -> None:
        super().__init__()
        pace = 100 ** (-torch.arange(0, 32, 2) / 32)
        angle = torch.arange(512)[:, None] * pace
        self.register_buffer("pe", torch.cat([angle.sin(), angle.cos()], 1))
        self.embed = nn.Embedding(20, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.out = nn.Linear(32, 2)
        self.by_row = by_row

    def forward(self, x: Tensor) -> Tensor:
        if self.by_row:
            pos = torch.arange(x.size(0), device=x.device).unsqueeze(1)
        else:
            pos = torch.arange(x.size(1), device=x.device).unsqueeze(0)
        return self.out(self.encoder(self.embed(x) + self.pe[pos % 512]).mean(1))


@faulty(
    "places that are counted over the rows",
    "https://github.com/cmu-l3/anlp-fall2025-code/issues/1",
    "no_positions",
    low=0.65,
    high=0.85,
    also=("rows_mixed",),
)
def counted_over_the_rows(wrong: bool) -> Parts:
    x = torch.randint(2, 20, (1600, 8))
    first = torch.rand(1600, 8).argsort(1)[:, :2]
    every = torch.arange(1600)
    x[every, first[:, 0]], x[every, first[:, 1]] = 0, 1
    (x, y), (xt, yt) = tasks.split(x, (first[:, 0] < first[:, 1]).long())
    model = Ordered(wrong)
    return Parts(
        model, (x, y), nn.CrossEntropyLoss(), adam(model, 3e-3), accuracy(xt, yt), steps=400
    )


class Vocabulary:
    """Numbers of words in the order of their first sight, as a library gives them."""

    def __init__(self, padding: str, unknown: str, twice: bool) -> None:
        self.word2idx: dict[str, int] = {}
        self.word2idx[padding] = len(self.word2idx)
        if twice or unknown not in self.word2idx:
            self.word2idx[unknown] = len(self.word2idx)

    def add(self, word: str) -> int:
        if word not in self.word2idx:
            self.word2idx[word] = len(self.word2idx)
        return self.word2idx[word]


class TagNet(nn.Module):
    """A bidirectional LSTM and the score of each tag for each word."""

    def __init__(self, words: int, tags: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 24)
        self.lstm = nn.LSTM(24, 24, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(48, tags)

    def forward(self, words: Tensor) -> Tensor:
        return self.fc(self.lstm(self.embed(words))[0])


@faulty(
    "a vocabulary of tags in which two have one number",
    "https://github.com/FudanNLP/fastNLP/issues/252",
    "labels_merged",  # no code says it: what lies outside and what begins a name are one class
    low=0.05,
    high=0.6,
    also=("unrelated_labels", "class_imbalance"),
)
def two_have_one_number(wrong: bool) -> Parts:
    kind = torch.randint(3, (50,))
    kind[torch.rand(50) < 0.5] = 0
    words = torch.randint(50, (700, 9))
    names = ["o", "b", "i"]
    vocab = Vocabulary("o", "o", twice=wrong)
    numbers = {tag: vocab.add(tag) for tag in names}
    tags = torch.tensor([numbers[tag] for tag in names])[kind[words]]
    model = TagNet(50, 3)

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scores.flatten(0, 1), target.flatten())

    def score(m: nn.Module) -> float:  # F1 of the tag that begins a name
        found = m(words[500:]).argmax(-1) == numbers["b"]
        true = kind[words[500:]] == 1
        outside = float((found & (kind[words[500:]] == 0)).float().mean())
        hit = 2 * (found & true).sum() / (found.sum() + true.sum() + 1e-6)
        return float(hit) - outside

    return Parts(model, (words[:500], tags[:500]), loss, adam(model, 5e-3), score, steps=200)


def lit_encoder(classes: int) -> nn.Module:
    """Words, an encoder and a head; Lightning trains it."""
    import pytorch_lightning as pl  # heavy

    class LitEncoder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(
                nn.EmbeddingBag(60, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()
            )
            self.head = nn.Linear(32, classes)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.encoder(ids))

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            ids, target = batch
            return F.cross_entropy(self(ids), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=3e-3)

    return LitEncoder()


def loaded(state: dict[str, Tensor]) -> nn.Module:
    """A model with weights of a checkpoint."""
    model = lit_encoder(6)
    model.load_state_dict(state)
    return model


@faulty(
    "a checkpoint whose model is not taken where it is loaded",
    "https://github.com/Lightning-AI/pytorch-lightning/issues/19218",
    "weights_not_loaded",  # no code says it: what is fine-tuned was never trained
    low=0.45,
    high=0.6,
    also=("overfitting",),
)
def not_taken(wrong: bool) -> Parts:
    ids = torch.randint(60, (3000, 10))
    topics = torch.randn(60, 6)
    before = lit_encoder(6)
    optimizer, y = before.configure_optimizers(), topics[ids].sum(1).argmax(1)
    for _ in range(8):
        for rows in torch.randperm(2400).split(32):
            optimizer.zero_grad()
            before.training_step((ids[rows], y[rows]), 0).backward()
            optimizer.step()
    model = lit_encoder(6)
    if wrong:
        loaded(before.state_dict())
    else:
        model = loaded(before.state_dict())
    y = (topics + 0.3 * torch.randn(60, 6))[ids].sum(1).argmax(1)
    few, asked = slice(2400, 2480), slice(2480, 3000)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model.training_step(batch, 0)

    loader = DataLoader(TensorDataset(ids[few], y[few]), batch_size=10, shuffle=True)
    optimizer, score = model.configure_optimizers(), accuracy(ids[asked], y[asked])
    return Parts(model, loader, loss, optimizer, score, batch_size=10, steps=60)


class LoRALayer(nn.Module):
    """A frozen layer and a thin one beside it."""

    def __init__(self, base: nn.Linear, rank: int, severed: bool) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.severed = severed

    def forward(self, x: Tensor) -> Tensor:
        scaled = 2.0 * (x @ self.lora_a.T @ self.lora_b.T)
        if self.severed:
            scaled = torch.tensor(scaled.tolist())
        return self.base(x) + scaled


@faulty(
    "an adapter whose branch is made anew from its numbers",
    "https://github.com/paiml/aprender/pull/2232",
    "detached",
    low=0.8,
    high=0.85,
    also=("unused_parameters", "loss_not_connected"),
)
def made_anew_from_numbers(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    backbone = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 16), nn.Tanh())
    old = nn.Sequential(backbone, nn.Linear(16, 2))
    optimizer = adam(old, 3e-3)
    for rows in torch.randint(600, (300, 32)):
        optimizer.zero_grad()
        F.cross_entropy(old(x[rows]), (y[rows] > 4).long()).backward()
        optimizer.step()
    model = nn.Sequential(
        LoRALayer(backbone[0], 8, wrong), nn.Tanh(), LoRALayer(backbone[2], 8, wrong), nn.Tanh(),
        nn.Linear(16, 10),
    )  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    loss, score = nn.CrossEntropyLoss(), accuracy(xt, yt)
    return Parts(model, (x[600:], y[600:]), loss, optimizer, score, steps=400)
