from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tikhon
from tikhon.errors import InputError
from tikhon.training.clipping import Clipping, below_the_last
from tikhon.training.step import Step

torch.manual_seed(0)
X, Y = torch.randn(6, 4), torch.arange(6) % 3
SOURCE = Path(tikhon.__file__).parent


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(net: nn.Module):
    return lambda batch: F.cross_entropy(net(batch[0]), batch[1])


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ],
)
@pytest.mark.parametrize("norm", [None, 0.1])
@pytest.mark.parametrize("rate", [None, lambda number: 1 / (1 + number)])
def test_steps_are_those_of_a_loop_written_by_hand(build, norm, rate):
    ours, theirs = model(), model()
    step = Step(ours, build(ours.parameters()), loss_of(ours), clip=Clipping(norm=norm), rate=rate)
    optimizer = build(theirs.parameters())
    lr = optimizer.param_groups[0]["lr"]
    for number in range(4):
        optimizer.param_groups[0]["lr"] = lr * (rate(number) if rate else 1)
        optimizer.zero_grad()
        loss = F.cross_entropy(theirs(X), Y)
        loss.backward()
        if norm:
            nn.utils.clip_grad_norm_(theirs.parameters(), norm)
        optimizer.step()
        found = step((X, Y), number)
        assert found == loss.detach() and not found.requires_grad
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("where", ["loss", "clip"])
def test_whoever_raises_keeps_the_weights(where):
    class Stop(Exception):
        pass

    def stop(given):
        raise Stop

    net = model()
    before = copy.deepcopy(net.state_dict())
    loss, clip = (stop, None) if where == "loss" else (loss_of(net), stop)
    with pytest.raises(Stop):
        Step(net, torch.optim.SGD(net.parameters(), lr=1.0), loss, clip=clip)((X, Y))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "hint"),
    [
        (lambda net: lambda b: net(b[0]).detach().sum(), "nothing that trains has a part"),
        (lambda net: lambda b: net(b[0]).exp_().sigmoid().add_(1).sum(), "write x = x \\+ y"),
    ],
)
def test_a_backward_pass_that_fails_is_told_with_what_to_change(loss, hint):
    net = model()
    with pytest.raises(InputError, match=f"backward pass of Sequential failed: .*{hint}"):
        Step(net, torch.optim.SGD(net.parameters(), lr=1.0), loss(net))((X, Y))


# ---- clipping


def gradients(net: nn.Module, size: float = 1.0) -> list[torch.Tensor]:
    net.zero_grad()
    (size * F.cross_entropy(net(X), Y)).backward()
    return [p.grad.clone() for p in net.parameters()]


def test_clipping_goes_from_entries_over_units_to_the_whole():
    net = model()
    free = gradients(net, 100.0)
    Clipping()(net)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), free))
    assert not Clipping() and all(Clipping(**{k: 1.0}) for k in ("value", "adaptive", "norm"))
    Clipping(value=0.5, adaptive=0.02, norm=0.1)(net)
    found = [p.grad for p in net.parameters()]
    wanted = [g.clamp(-0.5, 0.5) for g in free]
    for p, g in zip(net[0].parameters(), wanted):
        dims = 1 if p.ndim > 1 else None
        limit = 0.02 * torch.linalg.vector_norm(p.detach(), dim=dims, keepdim=True)
        size = torch.linalg.vector_norm(g, dim=dims, keepdim=True)
        g.mul_((limit / size).clamp_max(1))
    norm = torch.cat([g.flatten() for g in wanted]).norm()
    for g, w in zip(found, wanted):
        torch.testing.assert_close(g, w * min(1, 0.1 / norm))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("net", "names"),
    [
        (model(), ["0.weight", "0.bias"]),
        (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False)), ["0.weight", "0.bias"]),
        (nn.Sequential(model(), nn.BatchNorm1d(3, affine=False)), ["0.0.weight", "0.0.bias"]),
        (Tied(), ["middle.weight", "middle.bias"]),
    ],
)
def test_adaptive_clipping_leaves_the_last_layer_alone(net, names):
    """However many parameters the last layer has."""
    found = {id(p) for p in below_the_last(net)}
    assert [name for name, p in net.named_parameters() if id(p) in found] == names


def test_adaptive_clipping_of_a_single_layer_is_refused():
    for net in (nn.Linear(4, 3), nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.ReLU()):
        with pytest.raises(InputError, match=r"does not clip the last layer, and .* has no other"):
            below_the_last(net)
    with pytest.raises(InputError, match="does not clip the last layer"):
        tikhon.fit(nn.Linear(4, 3), (X, Y), tikhon.Recipe(clip_adaptive=0.1), epochs=1)


# ---- nothing else in the library trains

OTHERS = {  # that go down a gradient without being a step of training
    "population/population.py": "the twin of the step for many models, held to it by its law",
    "population/steppers.py": "the optimizer's part of that twin",
    "diagnosis/reference.py": "a line search over free outputs: no model is trained",
    "paths/weights.py": "a line search for the empty network: of what is not penalised",
    "strengths/validation.py": "a gradient of the validation loss, put back afterwards",
    "regularizer/optimizers.py": "a twin of the user's optimizer, asked how it moves",
}


def calls(path: Path) -> set[str]:
    """Gradients and updates that a file makes: `x.backward()`, `optimizer.step()`."""
    found = set()
    text = path.read_text(encoding="utf-8")
    if ".backward" not in text and ".step" not in text:
        return found
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if node.func.attr == "backward" or (
                node.func.attr == "step" and any(w in owner for w in ("optim", "solver", "clone"))
            ):
                found.add(f"{owner}.{node.func.attr}")
    return found


def test_one_piece_of_code_takes_the_steps():
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if calls(path)}
    assert found == {"training/step.py", *OTHERS}
