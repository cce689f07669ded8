"""Images with target maps: are images transformed without their maps?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tikhon.data.rows import split
from tikhon.diagnosis.samples import Samples

ROWS = 8  # of the data set that are read repeatedly
DRAWS = 5  # repeats until a row changes
FITS = 0.9  # correlation with what is moved, turned or mirrored
APART = 0.2  # margin over the correlation without motion
FEW = 3  # changed rows needed to judge
PAIRS = 64  # pairs of image and map that are compared
PAIRED = 0.5  # significant correlation of a map with its image, turned or not


def augmented_facts(source: Samples) -> dict[str, object]:
    """Return `moved_alone` for indexable data sets, else `fits_moved`.

    `moved_alone` is the share of images shifted, turned or mirrored on another read whose map
    stays; `fits_moved` the share of pairs whose map fits only when turned or mirrored.
    """
    rows = getattr(source.source, "dataset", None)
    if source.indexed or isinstance(rows, TensorDataset):
        return _pairs(source)
    if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
        return {}
    count = len(rows)  # type: ignore[arg-type]
    moved = []
    for place in range(min(ROWS, count)):
        found = _left_behind(rows, place * count // min(ROWS, count))
        moved += [found] if found is not None else []
    return {"moved_alone": sum(moved) / len(moved)} if len(moved) >= FEW else {}


def _pairs(source: Samples) -> dict[str, object]:
    x, y = source.probe
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.is_floating_point():
        return {}
    if x.ndim not in (3, 4) or y.ndim not in (3, 4) or x.shape[-2:] != y.shape[-2:]:
        return {}
    if min(x.shape[-2:]) < 4 or (x.shape == y.shape and torch.equal(x, y)):
        return {}
    pictures = x[:PAIRS].detach().double().reshape(len(x[:PAIRS]), -1, *x.shape[-2:])
    maps = y[:PAIRS].detach().double().reshape(len(y[:PAIRS]), -1, *y.shape[-2:])
    known = [_fits_moved(a, b) for a, b in zip(pictures, maps)]
    found = [moved for moved in known if moved is not None]
    return {"fits_moved": sum(found) / len(found)} if len(found) >= 2 * ROWS else {}


def _fits_moved(picture: Tensor, target: Tensor) -> bool | None:
    """Whether a map fits its image only turned or mirrored; None if it never fits."""
    a, b = (t - t.mean((-2, -1), keepdim=True) for t in (picture, target))
    size = a.flatten(1).norm(dim=1)[:, None] * b.flatten(1).norm(dim=1)
    if not bool((size > 0).any()):
        return None
    fits: list[float] = []
    for turns in range(4):
        for mirrored in (False, True):
            moved = _moved(b, (turns, mirrored, 0, 0))
            if moved.shape != b.shape:
                fits.append(0.0)
                continue
            alike = (a.flatten(1) @ moved.flatten(1).T).abs()
            fits.append(float((alike / size.clamp_min(1e-12)).max()))
    return fits[0] < max(fits) - APART if max(fits) > PAIRED else None


def _left_behind(rows: object, place: int) -> bool | None:
    """Whether an image moves and its target does not; None if the image does not move."""
    x, y = _picture(rows, place)
    if x is None or y is None:
        return None
    for _ in range(DRAWS - 1):
        other, target = _picture(rows, place)
        if other is None or target is None or other.shape != x.shape or torch.equal(other, x):
            continue
        motion = _motion(x, other)
        if motion is not None and not torch.equal(_moved(y, motion), y):
            return torch.equal(target, y)
    return None


def _picture(rows: object, place: int) -> tuple[Tensor | None, Tensor | None]:
    """Return image and target map as (channels, height, width); None for other rows."""
    x, y = split(rows[place])  # type: ignore[index]
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.is_floating_point():
        return None, None
    flat = not 2 <= x.ndim <= 3 or not 2 <= y.ndim <= 3 or min(x.shape[-2:]) < 4
    if flat or x.shape[-2:] != y.shape[-2:]:
        return None, None
    return x.reshape(-1, *x.shape[-2:]).double(), y.reshape(-1, *y.shape[-2:]).double()


Motion = tuple[int, bool, int, int]  # quarter turns, mirrored, shift down, shift right


def _moved(x: Tensor, motion: Motion) -> Tensor:
    turns, mirrored, down, right = motion
    turned = x.rot90(turns, (-2, -1))
    turned = turned.flip(-1) if mirrored else turned
    return turned.roll((down, right), (-2, -1)) if turned.shape == x.shape else x


def _motion(x: Tensor, other: Tensor) -> Motion | None:
    """Return the motion between two images; None unless it fits clearly better than none."""
    a, b = (t - t.mean((-2, -1), keepdim=True) for t in (x, other))
    size = float(a.norm() * b.norm())
    if size == 0:
        return None
    best: tuple[float, Motion] = (FITS, (0, False, 0, 0))
    for turns in range(4):
        for mirrored in (False, True):
            turned = _moved(a, (turns, mirrored, 0, 0))
            spectrum = torch.fft.fft2(b) * torch.fft.fft2(turned).conj()
            fit = torch.fft.ifft2(spectrum).real.sum(0) / size
            top = int(fit.argmax())
            place = divmod(top, fit.shape[1])
            if float(fit.flatten()[top]) > best[0] + 1e-9:
                best = float(fit.flatten()[top]), (turns, mirrored, *place)
    stays = float((a * b).sum()) / size
    return best[1] if best[0] > FITS and stays < best[0] - APART else None
