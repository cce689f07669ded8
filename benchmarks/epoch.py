"""An epoch of `tikhon fit` against the usual program: a DataLoader over per-sample transforms.

Both train the same 784-128-10 network from the same start on the same images by plain SGD with
an L1 penalty on the first layer. The usual program decodes each image on its own and adds the
penalty to the loss; tikhon takes batches by index and applies the prox. One process, one thread,
interleaved A B B A; the figure is the ratio of the medians of CPU seconds an epoch. The epochs of
tikhon include its scoring on 10,000 training rows. The arm "bare" is the arithmetic alone, which
no program can leave out: forward, backward and step on batches by index, no penalty, no scores.

    python benchmarks/epoch.py --data-dir MNIST       60,000 images
    python benchmarks/epoch.py --quick                6,000 images, of noise where MNIST is absent
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tikhon as tk
from tikhon.data import load
from tikhon.errors import DataError
from tikhon.models import build
from tikhon.training.loop import Training
from tikhon.training.settings import Settings

LR, BATCH, STRENGTH = 0.01, 64, 1e-4


class Images(Dataset):
    """What torchvision's MNIST and ToTensor do to a sample: an image object, then a tensor."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = torch.from_numpy(images), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        image = Image.fromarray(self.images[index].numpy())
        array = torch.from_numpy(np.array(image, np.uint8, copy=True))
        tensor = array.view(image.height, image.width, 1).permute(2, 0, 1).contiguous()
        return tensor.to(torch.float32).div(255), int(self.labels[index])


def network() -> nn.Module:
    torch.manual_seed(0)
    return build("mlp-784-128-10", (1, 28, 28), 10)


class Usual:
    """The usual program, with the norm that exists."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.model = network()
        self.loader = DataLoader(Images(images, labels), batch_size=BATCH, shuffle=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.loss = nn.CrossEntropyLoss()

    def epoch(self) -> None:
        self.model.train()
        for images, labels in self.loader:
            images = images.view(-1, 28 * 28)
            self.optimizer.zero_grad()
            loss = self.loss(self.model(images), labels)
            loss = loss + STRENGTH * torch.linalg.vector_norm(self.model.fc1.weight, ord=1)
            loss.backward()
            self.optimizer.step()


class Tikhon:
    """`tikhon fit`, one epoch at a time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, epochs: int) -> None:
        x = torch.from_numpy(images.astype(np.float32))[:, None].div_(255)
        settings = Settings(optimizer="sgd", lr=LR, batch_size=BATCH, epochs=epochs, device="cpu")
        recipe = tk.Recipe({"fc1.weight": tk.L1(STRENGTH)})
        self.model = network()
        self.training = Training(self.model, (x, torch.from_numpy(labels)), recipe, settings)

    def epoch(self) -> None:
        done = self.training.epoch
        self.training.run(stop=lambda: False, until=done + 1)


class Bare:
    """Forward, backward and step, nothing else."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.x = torch.from_numpy(images.astype(np.float32))[:, None].div_(255)
        self.y = torch.from_numpy(labels)
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, fused=True)

    def epoch(self) -> None:
        self.model.train()
        for rows in torch.randperm(len(self.y)).split(BATCH):
            x, y = self.x.index_select(0, rows), self.y.index_select(0, rows)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()


def images(data_dir: Path | None, rows: int) -> tuple[np.ndarray, np.ndarray, tuple, str]:
    """Training images and labels as bytes, the test tensors, and where they come from."""
    try:
        data = load("mnist", data_dir=data_dir, download=False)
        assert data.test is not None
        pixels = (data.x[:rows, 0] * 255).round().to(torch.uint8).numpy()
        return pixels, data.y[:rows].numpy(), (data.test.x, data.test.y), "mnist"
    except DataError:
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, rows)
        return pixels, labels, (torch.zeros(0), torch.zeros(0)), "noise of MNIST's shape"


def measure(arms: dict, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every epoch, interleaved A B B A."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds):
        for name in list(arms) if i % 2 == 0 else list(arms)[::-1]:
            start = time.process_time()
            arms[name].epoch()
            seconds[name].append(time.process_time() - start)
            print(f"  round {i + 1}  {name:<7} {seconds[name][-1]:6.2f} s CPU", flush=True)
    return seconds


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = 6_000 if options.quick else 60_000
    pixels, labels, test, origin = images(options.data_dir, rows)
    arms = {
        "usual": Usual(pixels, labels),
        "tikhon": Tikhon(pixels, labels, options.rounds),
        "bare": Bare(pixels, labels),
    }
    print(f"{rows:,} images ({origin}), batch {BATCH}, one thread, torch {torch.__version__}")
    seconds = measure(arms, options.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "data": origin,
        "rows": rows,
        "seconds": seconds,
        "median": medians,
        "ratio": medians["usual"] / medians["tikhon"],
        "bound": (bound := medians["usual"] / medians["bare"]),
    }
    if len(test[0]):
        result["test_accuracy"] = {n: accuracy(arm.model, *test) for n, arm in arms.items()}
        zeros = {n: float((arm.model.fc1.weight == 0).double().mean()) for n, arm in arms.items()}
        result["zeros"] = zeros
    for name, median in medians.items():
        scores = (
            f", test accuracy {result['test_accuracy'][name]:.4f}, exact zeros "
            f"{result['zeros'][name]:.1%}"
            if len(test[0])
            else ""
        )
        print(f"{name:<7} {median:7.3f} s CPU an epoch{scores}")
    print(f"ratio   {result['ratio']:.1f}x (target 10x); bare arithmetic would be {bound:.1f}x")
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
