"""Save estimators as one safetensors file: arrays, and JSON in its header, without pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import tikhon
from tikhon.errors import DataError, StorageError
from tikhon.runs.files import SCHEMA_VERSION, to_plain, write_bytes
from tikhon.sklearn.network import Network

_PLAIN = (
    "n_features_in_",
    "n_iter_",
    "alpha_",
    "best_loss_",
    "loss_curve_",
    "alpha_curve_",
    "validation_scores_",
)

_KINDS: dict[str, type] = {}  # loadable classes by name
Kind = TypeVar("Kind", bound=type)


def saveable(kind: Kind) -> Kind:
    """Allow `load` to read estimators of the decorated class."""
    _KINDS[kind.__name__] = kind
    return kind


def save(estimator: Any, path: str | Path) -> None:
    """Write a fitted estimator; see `RegularizedClassifier.save`."""
    from safetensors.torch import save as to_bytes

    parameters = estimator.get_params(deep=False)
    if isinstance(factors := parameters.get("class_weight"), Mapping):  # JSON keys are strings
        parameters["class_weight"] = to_plain([[key, value] for key, value in factors.items()])
    try:
        json.dumps(parameters)
    except TypeError as error:
        parameters = {k: v for k, v in parameters.items() if k != "random_state"}
        try:
            parameters = json.loads(json.dumps(to_plain(parameters), allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError(f"parameters that JSON cannot hold: {error}") from error
    document = {
        "schema_version": SCHEMA_VERSION,
        "tikhon": tikhon.__version__,
        "kind": type(estimator).__name__,
        "parameters": parameters,
        "attributes": {name: getattr(estimator, name) for name in _PLAIN},
        "sizes": estimator.network_.sizes,
        "dtype": str(estimator.network_.shift.dtype).removeprefix("torch."),
        "feature_names": [str(n) for n in getattr(estimator, "feature_names_in_", ())],
        "classes": _classes(estimator),
        "flat": getattr(estimator, "_flat", None),
        "multilabel": getattr(estimator, "_multilabel", None),
    }
    text = json.dumps(to_plain(document), allow_nan=False)
    tensors = {k: v.contiguous().clone() for k, v in estimator.network_.state_dict().items()}
    header = {"estimator": text, "sha256": _digest(text, tensors)}
    write_bytes(Path(path), to_bytes(tensors, metadata=header))


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def load(path: str | Path) -> Any:
    """Load the fitted estimator that `save` wrote to `path`; `partial_fit` starts a new optimizer.

    Raises DataError for a damaged or different file, StorageError for an unreadable one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
        text = header.get("estimator", "{}")
        document = json.loads(text)
        if document.get("kind") not in _KINDS:
            raise DataError(f"{path} is not an estimator of tikhon.sklearn")
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{path} is not an estimator of tikhon.sklearn ({error})") from error
    if "sha256" not in header:
        raise DataError(
            f"{path} was saved by an older version of tikhon, without the checksum that now "
            "protects it; fit the estimator again and save it"
        )
    if header["sha256"] != _digest(text, state):
        raise DataError(
            f"{path} is damaged: it holds other bytes than were written; copy it again"
        )
    return _restored(_KINDS[document["kind"]], document, state)


def _restored(kind: type, document: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    parameters = dict(document["parameters"])
    if isinstance(parameters.get("hidden_layer_sizes"), list):
        parameters["hidden_layer_sizes"] = tuple(parameters["hidden_layer_sizes"])
    if parameters["n_iter_no_change"] is None:  # JSON has no infinity
        parameters["n_iter_no_change"] = np.inf
    if isinstance(parameters.get("class_weight"), list):
        parameters["class_weight"] = dict(parameters["class_weight"])
    estimator = kind(**parameters)
    for name, value in document["attributes"].items():
        setattr(estimator, name, value)
    sizes, dtype = document["sizes"], getattr(torch, document["dtype"])
    estimator.network_ = Network(sizes, estimator.activation, estimator.dropout, dtype).eval()
    estimator.network_.load_state_dict(state)
    estimator._random = np.random.RandomState(0)
    estimator._optimizer_state = None
    if document["feature_names"]:
        estimator.feature_names_in_ = np.array(document["feature_names"], object)
    if (classes := document["classes"]) is not None:
        estimator.classes_ = np.array(classes["values"], classes["dtype"])
        estimator._multilabel = document["multilabel"]
    else:
        estimator._flat = document["flat"]
    estimator._set_fitted_attributes()
    return estimator


def _classes(estimator: object) -> dict[str, object] | None:
    classes = getattr(estimator, "classes_", None)
    if classes is None:
        return None
    if classes.dtype == object and not all(isinstance(c, str) for c in classes):
        raise ValueError(f"classes that JSON cannot hold: {classes!r}")
    return {"values": classes.tolist(), "dtype": classes.dtype.str}
