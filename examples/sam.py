"""Sharpness-aware minimisation, written by hand, with a group lasso: python examples/sam.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tikhon as tk


class SAM(torch.optim.Optimizer):
    """Foret et al. (2021), https://arxiv.org/abs/2010.01412, around any optimizer."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def climb(self):
        graded = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in graded]).norm() + 1e-12
        for p in graded:
            self.state[p]["away"] = p.grad * (self.defaults["rho"] / norm)
            p.add_(self.state[p]["away"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["away"])
        return self.base.step()


digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
sam = SAM(model.parameters(), torch.optim.AdamW, lr=3e-3, weight_decay=0.0)
reg = tk.regularize(model, sam, {"0.weight": tk.GroupLasso(3e-3)})
print(f"acts in the steps of {type(reg.optimizer).__name__}, inside {type(sam).__name__}")

for _ in range(300):
    batch = torch.randint(len(x), (64,))
    for move in (sam.climb, sam.step):  # the penalty acts once, at the weights themselves
        sam.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        move()

neurons = int((model[0].weight != 0).any(1).sum())
accuracy = (model(x).argmax(1) == y).float().mean()
print(f"{reg.steps} steps, {neurons} of 128 neurons left, accuracy {accuracy:.3f}")
