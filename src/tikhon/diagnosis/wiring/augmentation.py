"""Images with target maps: are images transformed without their maps?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tikhon.data.nested import split_batch
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.wiring.program import Facts

ROWS = 8  # of the data set that are read repeatedly
RANDOM_FUNCTIONS = 5  # repeats until a row changes
MATCH = 0.9  # correlation with what is moved, turned or mirrored
MARGIN = 0.2  # margin over the correlation without motion
MIN_CHANGED = 3  # changed rows needed to judge
MAX_PAIRS = 64  # pairs of image and map that are compared
RELATED = 0.5  # significant correlation of a map with its image, turned or not


def augmentation_facts(source: Samples) -> Facts:
    """Return `moved_alone` for indexable data sets, else `fits_moved`.

    `moved_alone` is the share of images shifted, turned or mirrored on another read whose map
    stays; `fits_moved` the share of pairs whose map fits only when turned or mirrored.
    """
    rows = getattr(source.source, "dataset", None)
    if source.indexed or isinstance(rows, TensorDataset):
        return _compare_pairs(source)
    if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
        return {}
    count = len(rows)  # type: ignore[arg-type]
    moved = []
    for place in range(min(ROWS, count)):
        found = _target_stays(rows, place * count // min(ROWS, count))
        moved += [found] if found is not None else []
    return {"moved_alone": sum(moved) / len(moved)} if len(moved) >= MIN_CHANGED else {}


def _compare_pairs(source: Samples) -> Facts:
    x, y = source.probe
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.is_floating_point():
        return {}
    if x.ndim not in (3, 4) or y.ndim not in (3, 4) or x.shape[-2:] != y.shape[-2:]:
        return {}
    if min(x.shape[-2:]) < 4 or (x.shape == y.shape and torch.equal(x, y)):
        return {}
    images = x[:MAX_PAIRS].detach().double().reshape(len(x[:MAX_PAIRS]), -1, *x.shape[-2:])
    maps = y[:MAX_PAIRS].detach().double().reshape(len(y[:MAX_PAIRS]), -1, *y.shape[-2:])
    known = [_fits_moved(a, b) for a, b in zip(images, maps)]
    found = [moved for moved in known if moved is not None]
    return {"fits_moved": sum(found) / len(found)} if len(found) >= 2 * ROWS else {}


def _fits_moved(image: Tensor, target: Tensor) -> bool | None:
    """Whether a map fits its image only turned or mirrored; None if it never fits."""
    a, b = (t - t.mean((-2, -1), keepdim=True) for t in (image, target))
    size = a.flatten(1).norm(dim=1)[:, None] * b.flatten(1).norm(dim=1)
    if not bool((size > 0).any()):
        return None
    fits: list[float] = []
    for turns in range(4):
        for mirrored in (False, True):
            moved = _apply_motion(b, (turns, mirrored, 0, 0))
            if moved.shape != b.shape:
                fits.append(0.0)
                continue
            similarity = (a.flatten(1) @ moved.flatten(1).T).abs()
            fits.append(float((similarity / size.clamp_min(1e-12)).max()))
    return fits[0] < max(fits) - MARGIN if max(fits) > RELATED else None


def _target_stays(rows: object, place: int) -> bool | None:
    """Whether an image moves and its target does not; None if the image does not move."""
    x, y = _read_image(rows, place)
    if x is None or y is None:
        return None
    for _ in range(RANDOM_FUNCTIONS - 1):
        other, target = _read_image(rows, place)
        if other is None or target is None or other.shape != x.shape or torch.equal(other, x):
            continue
        motion = _estimate_motion(x, other)
        if motion is not None and not torch.equal(_apply_motion(y, motion), y):
            return torch.equal(target, y)
    return None


def _read_image(rows: object, place: int) -> tuple[Tensor | None, Tensor | None]:
    """Return image and target map as (channels, height, width); None for other rows."""
    x, y = split_batch(rows[place])  # type: ignore[index]
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.is_floating_point():
        return None, None
    flat = not 2 <= x.ndim <= 3 or not 2 <= y.ndim <= 3 or min(x.shape[-2:]) < 4
    if flat or x.shape[-2:] != y.shape[-2:]:
        return None, None
    return x.reshape(-1, *x.shape[-2:]).double(), y.reshape(-1, *y.shape[-2:]).double()


Motion = tuple[int, bool, int, int]  # quarter turns, mirrored, shift down, shift right


def _apply_motion(x: Tensor, motion: Motion) -> Tensor:
    turns, mirrored, down, right = motion
    turned = x.rot90(turns, (-2, -1))
    turned = turned.flip(-1) if mirrored else turned
    return turned.roll((down, right), (-2, -1)) if turned.shape == x.shape else x


def _estimate_motion(x: Tensor, other: Tensor) -> Motion | None:
    """Return the motion between two images; None unless it fits clearly better than none."""
    a, b = (t - t.mean((-2, -1), keepdim=True) for t in (x, other))
    size = float(a.norm() * b.norm())
    if size == 0:
        return None
    best: tuple[float, Motion] = (MATCH, (0, False, 0, 0))
    for turns in range(4):
        for mirrored in (False, True):
            turned = _apply_motion(a, (turns, mirrored, 0, 0))
            spectrum = torch.fft.fft2(b) * torch.fft.fft2(turned).conj()
            fit = torch.fft.ifft2(spectrum).real.sum(0) / size
            top = int(fit.argmax())
            place = divmod(top, fit.shape[1])
            if float(fit.flatten()[top]) > best[0] + 1e-9:
                best = float(fit.flatten()[top]), (turns, mirrored, *place)
    stays = float((a * b).sum()) / size
    return best[1] if best[0] > MATCH and stays < best[0] - MARGIN else None
