"""Instances of everything that has laws; a public class without one fails the build."""

from __future__ import annotations

import torch
from torch import nn

from layers import laws
from layers.laws import LayerExample, module
from tikhon import layers, penalties


def _bernoulli(rate: float) -> float:
    return rate / (1 - rate)


def _moved(mixout: layers.Mixout) -> layers.Mixout:
    with torch.no_grad():
        mixout.module.get_parameter("weight").add_(1.0)  # away from its target
    return mixout


def _dropped(layer: layers.NoiseLayer, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Nothing is left of the weights that the layer drops."""
    recurrent = isinstance(layer, (layers.WeightDrop, layers.RecurrentDropout))
    gone = "weight_hh" in name if recurrent else name.endswith("weight")
    return torch.zeros_like(weight) if gone else weight


def _pretrained(layer: layers.NoiseLayer, name: str, weight: torch.Tensor) -> torch.Tensor:
    return layer.get_buffer("target_" + name.removeprefix("module.").replace(".", "_"))


LAYERS = [
    LayerExample(
        "Dropout",
        layers.Dropout,
        (8, 6),
        variance=_bernoulli,
        tied=(),
        monotone=True,
    ),
    LayerExample(
        "Dropout-tied",
        lambda rate: layers.Dropout(rate, tied=(0,)),
        (8, 6),
        variance=_bernoulli,
        tied=(0,),
    ),
    LayerExample(
        "Dropout1d", layers.Dropout1d, (4, 3, 5), variance=_bernoulli, tied=(2,), monotone=True
    ),
    LayerExample(
        "Dropout2d",
        layers.Dropout2d,
        (4, 3, 5, 5),
        variance=_bernoulli,
        tied=(2, 3),
        monotone=True,
    ),
    LayerExample(
        "Dropout3d", layers.Dropout3d, (4, 3, 2, 3, 3), variance=_bernoulli, tied=(2, 3, 4)
    ),
    LayerExample(
        "AlphaDropout", layers.AlphaDropout, (8, 6), multiplicative=False, mean_kept=False
    ),
    LayerExample(
        "FeatureAlphaDropout",
        layers.FeatureAlphaDropout,
        (8, 6, 3),
        tied=(2,),
        multiplicative=False,
        mean_kept=False,
    ),
    LayerExample(
        "GaussianDropout",
        layers.GaussianDropout,
        (8, 6),
        variance=_bernoulli,
        tied=(),
    ),
    LayerExample(
        "GaussianNoise",
        layers.GaussianNoise,
        (8, 6),
        variance=lambda std: std**2,
        tied=(),
        multiplicative=False,
        at_one=laws.unit_noise_is_added,
    ),
    LayerExample(
        "DropPath", layers.DropPath, (8, 2, 3), variance=_bernoulli, tied=(1, 2), monotone=True
    ),
    LayerExample(
        "DropPath-batch",
        lambda rate: layers.DropPath(rate, mode="batch"),
        (8, 2, 3),
        variance=_bernoulli,
        tied=(0, 1, 2),
    ),
    LayerExample(
        "ShakeDrop",
        layers.ShakeDrop,
        (8, 2, 3),
        tied=(1, 2),
        variance=lambda rate: (1 - rate) + rate / 3 - (1 - rate) ** 2,
        multiplicative=False,
        at_one=laws.branch_is_shaken,
        identity=False,
    ),
    LayerExample(
        "ShakeDrop-row",
        lambda rate: layers.ShakeDrop(rate, mode="row"),
        (8, 2, 3),
        tied=(1, 2),
        variance=lambda rate: (1 - rate) + rate / 3 - (1 - rate) ** 2,
        multiplicative=False,
        at_one=laws.branch_is_shaken,
        identity=False,
    ),
    LayerExample(
        "DropBlock1d",
        lambda rate: layers.DropBlock1d(rate, 3),
        (4, 3, 9),
        at_one=laws.blocks_fall_at_their_seed_rate,
        mean_kept=False,
    ),
    LayerExample(
        "DropBlock2d",
        lambda rate: layers.DropBlock2d(rate, 3),
        (4, 3, 7, 8),
        at_one=laws.blocks_fall_at_their_seed_rate,
        mean_kept=False,
    ),
    LayerExample(
        "DropBlock2d-shared",
        lambda rate: layers.DropBlock2d(rate, 3, shared=True),
        (4, 3, 7, 7),
        at_one=laws.blocks_fall_at_their_seed_rate,
        mean_kept=False,
        tied=(1,),
    ),
    LayerExample(
        "DropBlock3d",
        lambda rate: layers.DropBlock3d(rate, 3),
        (3, 2, 5, 5, 5),
        at_one=laws.blocks_fall_at_their_seed_rate,
        mean_kept=False,
    ),
    LayerExample(
        "TokenDropout",
        layers.TokenDropout,
        (4, 6, 3),
        variance=_bernoulli,
        tied=(2,),
        monotone=True,
    ),
    LayerExample(
        "PatchDropout",
        lambda rate: layers.PatchDropout(rate, ordered=True),
        (4, 9, 3),
        multiplicative=False,
        mean_kept=False,
        at_one=laws.one_token_stays,
        lengths=True,
    ),
    LayerExample(
        "PatchDropout-in-place",
        lambda rate: layers.PatchDropout(rate, remove=False),
        (4, 9, 3),
        mean_kept=False,
        at_one=laws.one_token_stays,
        monotone=True,
    ),
    LayerExample(
        "LockedDropout",
        layers.LockedDropout,
        (4, 6, 3),
        variance=_bernoulli,
        tied=(1,),
        monotone=True,
    ),
    LayerExample(
        "WordDropout",
        lambda rate: layers.WordDropout(rate, unknown=0),
        (4, 9),
        mean_kept=False,
        multiplicative=False,
        tokens=True,
    ),
    LayerExample(
        "InputDropout",
        layers.InputDropout,
        (4, 2, 8, 8),
        mean_kept=False,
        tied=(1,),
        at_one=laws.square_covers_nine_sixteenths,
    ),
    LayerExample(
        "DropConnect",
        module(lambda: nn.Linear(5, 4), layers.DropConnect),
        (6, 5),
        multiplicative=False,
        at_one=laws.weights_are(_dropped),
        identity=False,
    ),
    LayerExample(
        "DropConnect-conv",
        module(lambda: nn.Conv2d(2, 3, 3, bias=False), layers.DropConnect),
        (3, 2, 5, 5),
        multiplicative=False,
        identity=False,
    ),
    LayerExample(
        "WeightDrop",
        module(lambda: nn.LSTM(5, 4, 2, batch_first=True), layers.WeightDrop),
        (6, 3, 5),
        mean_kept=False,
        multiplicative=False,
        at_one=laws.weights_are(_dropped),
        identity=False,
    ),
    LayerExample(
        "RecurrentDropout",
        module(lambda: nn.GRU(5, 4, 2, batch_first=True), layers.RecurrentDropout),
        (6, 3, 5),
        mean_kept=False,
        multiplicative=False,
        at_one=laws.weights_are(_dropped),
        identity=False,
    ),
    LayerExample(
        "EmbeddingDropout",
        module(lambda: nn.Embedding(9, 3), layers.EmbeddingDropout),
        (4, 6),
        multiplicative=False,
        identity=False,
        tokens=True,
    ),
    LayerExample(
        "Mixout",
        module(lambda: nn.Linear(5, 4), lambda m, rate: _moved(layers.Mixout(m, rate))),
        (6, 5),
        multiplicative=False,
        at_one=laws.weights_are(_pretrained),
        identity=False,
    ),
    LayerExample(
        "ConcreteDropout",
        layers.ConcreteDropout,
        (8, 6),
        tied=(),
        learned=True,
    ),
    LayerExample(
        "VariationalDropout",
        module(lambda: nn.Linear(5, 4), layers.VariationalDropout),
        (6, 5),
        at_one=laws.no_weight_survives,
        multiplicative=False,
        identity=False,
        learned=True,
    ),
]

_SOURCE = torch.Generator().manual_seed(0)

# shape (4, 6), strong enough that some entries of a standard normal become zero
PENALTIES = [
    penalties.L1(0.3),
    penalties.L1(0.3, weights=torch.rand(4, 6, generator=_SOURCE, dtype=torch.float64)),
    penalties.L2(0.3),
    penalties.L2(0.3, center=torch.randn(4, 6, generator=_SOURCE, dtype=torch.float64)),
    penalties.ElasticNet(0.3, l1_ratio=0.4),
    penalties.ElasticNet(0.3, weights=torch.rand(6, generator=_SOURCE, dtype=torch.float64)),
    penalties.Huber(0.4, delta=0.5),
    penalties.MCP(0.4, gamma=1.5),
    penalties.MCP(0.4, gamma=0.3),  # step beyond gamma: a hard threshold
    penalties.SCAD(0.4, a=2.2),
    penalties.LogSum(0.2, epsilon=0.1),
    penalties.LogSum(0.2, epsilon=1.0),  # convex prox objective
    penalties.Huber(0.4, weights=torch.rand(4, 6, generator=_SOURCE, dtype=torch.float64)),
    penalties.MCP(0.4, weights=2 * torch.rand(4, 6, generator=_SOURCE, dtype=torch.float64)),
    penalties.SCAD(0.4, weights=2 * torch.rand(6, generator=_SOURCE, dtype=torch.float64)),
    penalties.LogSum(0.2, weights=torch.rand(4, 6, generator=_SOURCE, dtype=torch.float64)),
    penalties.SparseGroupLasso(0.4, weights=torch.tensor([0.5, 0.0, 2.0, 1.0])),
    penalties.GroupMCP(0.4, weights=torch.tensor([0.5, 0.0, 2.0, 1.0])),
    penalties.GroupLasso(0.4),
    penalties.GroupLasso(0.4, weights=torch.tensor([0.5, 0.0, 2.0, 1.0]), scale_by_size=True),
    penalties.SparseGroupLasso(0.4, l1_ratio=0.4),
    penalties.GroupMCP(0.4, gamma=2.0),
    penalties.LInf(0.4),
    penalties.LInf(0.4, weights=torch.tensor([0.5, 0.0, 2.0, 1.0])),
    penalties.NuclearNorm(0.4),
    penalties.SpectralNorm(0.4),
    penalties.Orthogonal(0.1),
    penalties.SLOPE(0.3),
    penalties.TotalVariation(0.3),
    penalties.Hierarchical(0.4, M=1.0),
    penalties.Hierarchical(0.4, M=0.5, skip=2),
    penalties.Hierarchical(0.4, M=1.0, weights=torch.tensor([0.5, 0.0, 2.0, 1.0])),
    penalties.MaxNorm(1.0),
    penalties.UnitNorm(),
    penalties.MinMaxNorm(0.8, 1.5),
    penalties.MinMaxNorm(max_value=1.5),
    penalties.NonNegative(),
    penalties.Box(-0.5, 0.7),
    penalties.Simplex(2.0),
    penalties.L1Ball(2.0),
    penalties.L2Ball(1.5),
    penalties.SpectralBall(1.0),
    penalties.TopK(3),
]
