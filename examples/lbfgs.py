"""An optimizer with a closure, ridge regression by LBFGS: python examples/lbfgs.py."""

import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from torch import nn

import tikhon as tk

data, target = load_diabetes(return_X_y=True)
x = torch.tensor((data - data.mean(0)) / data.std(0))
y = torch.tensor((target - target.mean()) / target.std())[:, None]

model = nn.Linear(10, 1, bias=False).double()
optimizer = torch.optim.LBFGS(
    model.parameters(),
    max_iter=100,
    line_search_fn="strong_wolfe",
    tolerance_grad=1e-10,
    tolerance_change=1e-14,
)
tk.regularize(model, optimizer, {"weight": tk.L2(0.1)})


def closure() -> torch.Tensor:
    optimizer.zero_grad()
    loss = (model(x) - y).square().sum() / (2 * len(x))
    loss.backward()
    return loss


value = optimizer.step(closure)  # tikhon adds the penalty inside the closure
exact = Ridge(alpha=0.1 * len(x), fit_intercept=False).fit(x.numpy(), y.numpy().ravel()).coef_
difference = (model.weight.detach().numpy().ravel() - exact).__abs__().max()
print(f"loss + penalty at the start {value:.4f}, difference to scikit-learn {difference:.1e}")
assert difference < 1e-6
