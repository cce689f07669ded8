"""A loss that calls the model is seen as one of answers and targets, where it is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from faulty import adam
from tikhon.diagnosis import diagnose
from tikhon.diagnosis.replica import replicate
from tikhon.diagnosis.samples import samples
from tikhon.diagnosis.wiring.loss_extraction import extract_loss

G = torch.Generator().manual_seed(0)
WORDS = torch.randint(3, 12, (64, 1), generator=G)
TOKENS = torch.cat([torch.ones(64, 1).long(), 3 + (WORDS + torch.arange(7)) % 9], 1)
TEXTS = DataLoader(TensorDataset(TOKENS[:, 1:].flip(1), TOKENS), 32)


class Reader(nn.Module):
    """Reads a source, and answers to each word of a target with scores, flat as many write it."""

    def __init__(self, *, masked: bool = True, flat: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(12, 16), nn.Embedding(8, 16)
        layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.decoder, self.head = nn.TransformerDecoder(layer, 1), nn.Linear(16, 12)
        self.masked, self.flat = masked, flat

    def forward(self, source, target):
        size = target.shape[1]
        seen = self.words(target) + self.places(torch.arange(size))
        read = self.words(source) + self.places(torch.arange(source.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(size) if self.masked else None
        scores = self.head(self.decoder(seen, read, tgt_mask=mask))
        return scores.flatten(0, 1) if self.flat else scores


def right(model, batch):
    source, target = batch
    scores = model(source, target[:, :-1])
    return F.cross_entropy(scores.view(-1, 12), target[:, 1:].reshape(-1))


def unshifted(model, batch):
    source, target = batch
    return F.cross_entropy(model(source, target).view(-1, 12), target.reshape(-1))


def squashed(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("flat", [True, False])
def test_a_translator_is_told_what_its_loss_hides(flat):
    def top(model, loss):
        return [f.code for f in diagnose(model, TEXTS, loss).findings if f.severity != "info"]

    assert not top(Reader(flat=flat), right)
    assert top(Reader(masked=False, flat=flat), right)[0] == "future_visible"
    assert top(Reader(flat=flat), unshifted)[0] == "target_among_inputs"


def test_a_softmax_in_front_of_a_loss_that_calls_the_model_is_found():
    x = torch.randn(300, 8, generator=G)
    y = x[:, :4].argmax(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Softmax(1))
    found = diagnose(model, (x, y), squashed, optimizer=adam(0.01), steps=40)
    assert "head_mismatch" in found.labels
    assert "head_mismatch" not in diagnose(model[:3], (x, y), squashed).labels


class Named(nn.Module):
    """Computes its loss on labels that it moves itself, and gives scores beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(12, 16), nn.Linear(16, 12)

    def forward(self, tokens, mask=None, labels=None):
        scores = self.head(self.words(tokens))
        if labels is None:
            return {"logits": scores}
        moved = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return {"loss": F.cross_entropy(scores.view(-1, 12), moved.view(-1)), "logits": scores}


def test_what_was_lifted_costs_the_same():
    named = {"tokens": TOKENS, "mask": torch.ones_like(TOKENS), "labels": TOKENS}
    for model, data, loss in ((Reader(), TEXTS, right), (Named(), named, None)):
        replica, source = replicate(model, loss), samples(data)
        plain, seen = extract_loss(replica, source)
        assert not plain.whole
        with torch.no_grad():
            torch.testing.assert_close(plain.value(seen.probe), replica.value(source.probe))
            assert plain.outcome(seen.probe)[0].shape[:2] == seen.probe[1].shape[:2]


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: F.mse_loss(model(batch[0] + 1), torch.randn_like(batch[0])),
        lambda model, batch: F.mse_loss(model(batch[0]), batch[0]) + model.weight.square().sum(),
        lambda model, batch: F.mse_loss(model(batch[0]), model(batch[0]).detach()),
        lambda model, batch: (model(batch[0]) - batch[0]).square().mean(),
    ],
    ids=["drawn", "penalised", "of two passes", "by hand"],
)
def test_a_loss_of_another_form_stays_as_it_is(loss):
    replica, source = replicate(nn.Linear(4, 4), loss), samples([torch.randn(50, 4)])
    assert extract_loss(replica, source) == (replica, source)
    assert not replica.model._forward_hooks
