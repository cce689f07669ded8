"""Run by torchrun on two gloo processes: DDP and FSDP2 against the single process.

Rank 0 prints one JSON object; the tests read it.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings

import torch
import torch.distributed as dist
from rules import Heavy
from torch import nn, optim
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tikhon as tk
from tikhon.regularizer.controller import Controller

warnings.simplefilter("ignore")


class Own(Controller):
    """A controller of a user's own, which has not said that it reads shards."""

    start, per = 0.1, "term"

    def next(self, strength, observation, step):
        return strength


TERMS = {
    "elementwise": {"*": [tk.L1(0.02), tk.L2(0.05)], "0.bias": tk.ElasticNet(0.02)},
    "rows": {"0.weight": tk.GroupLasso(0.05), "2.weight": [tk.SparseGroupLasso(0.03), tk.L2(0.1)]},
    "decoupled": {"*": tk.Term(tk.L2(0.3), how="decoupled")},
    "controllers": {
        "0.weight": tk.L1(tk.TargetSparsity(0.6, steps=4)),
        "2.weight": tk.L2(tk.NormBound(0.05)),
    },
    "row controllers": {"0.weight": tk.GroupLasso(tk.TargetSparsity(0.4, steps=4, per="layer"))},
    "constraints": {"0.weight": tk.MaxNorm(0.4), "2.weight": tk.Box(-0.1, 0.2)},
}
OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: optim.AdamW(p, lr=0.02, weight_decay=0.0),
    "Heavy": lambda p: Heavy(p, lr=0.02),  # no gain is known: by orthants
}
REFUSED = {
    "columns": tk.Term(tk.GroupLasso(0.1), rows="in"),
    "one group": tk.Term(tk.GroupLasso(0.1), rows="tensor"),
    "matrix": tk.Term(tk.NuclearNorm(0.1)),
    "smooth matrix": tk.Term(tk.Orthogonal(0.1)),
    "sorted": tk.Term(tk.SLOPE(0.1)),
    "weighted": tk.Term(tk.L1(0.1, weights=torch.ones(5, 8))),
    "controlled": tk.Term(tk.L1(Own())),
}


def network():
    """Five and one outputs: no dimension divides evenly by two processes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(wrap, terms, make, batches, mine):
    """Largest difference to the single process, in weights, in value and in zeros."""
    single = network()
    optimizer = make(single.parameters())
    reference = tk.regularize(single, optimizer, terms)
    train(single, optimizer, batches)

    model = wrap(network())
    optimizer = make(model.parameters())
    reg = tk.regularize(model, optimizer, terms)
    train(model, optimizer, mine)
    pairs = zip(single.parameters(), model.parameters())
    difference = max(float((a - full(b)).abs().max().detach()) for a, b in pairs)
    value = abs(float(reference.value()) - float(reg.value()))
    values = [torch.zeros(()) for _ in range(2)]
    dist.all_gather(values, reg.value())
    return {
        "weights": difference,
        "value": value,
        "same value everywhere": bool(values[0] == values[1]),
        "zeros": reg.sparsity() == reference.sparsity(),
        "strengths": max(
            abs(a - b) / max(a, 1e-12)
            for a, b in zip(reference.strengths().values(), reg.strengths().values())
        )
        if reg.strengths()
        else 0.0,
        "trace": abs(sum(row.value for row in reg.trace()) - float(reg.value())),
    }


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(16, 8, generator=generator), torch.randn(16, 1, generator=generator))
        for _ in range(6)
    ]
    half = slice(8 * rank, 8 * rank + 8)
    mine = [(x[half], y[half]) for x, y in batches]

    def shard(model):
        for layer in (model[0], model[2]):
            fully_shard(layer)
        return fully_shard(model)

    results = {}
    for name, terms in TERMS.items():
        for kind, make in OPTIMIZERS.items():
            if kind == "Heavy" and "controllers" in name:
                continue
            ddp = compare(DistributedDataParallel, terms, make, batches, mine)
            fsdp = compare(shard, copy.deepcopy(terms), make, batches, mine)
            results[f"{name} {kind}"] = {"DDP": ddp, "FSDP2": fsdp}
    refusals = {}
    for name, term in REFUSED.items():
        model = shard(network())
        try:
            tk.regularize(model, optim.SGD(model.parameters(), lr=0.1), {"0.weight": term})
            refusals[name] = ""
        except TypeError as error:
            refusals[name] = str(error)
    model = FullyShardedDataParallel(
        network(), use_orig_params=True, device_id=torch.device("cpu")
    )
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    flattened = []
    for attach in (
        lambda: tk.regularize(model, optimizer, {"0.weight": tk.GroupLasso(0.1)}),
        lambda: tk.sparsify(model, optimizer, 0.5, steps=10),
    ):
        try:
            attach()
        except TypeError as error:
            flattened.append(str(error))
    if rank == 0:
        found = {"results": results, "refusals": refusals, "flattened": flattened}
        json.dump(found, sys.stdout)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
