import dataclasses
import tomllib

import pytest
import torch

import tikhon as tk
from tikhon.errors import InputError
from tikhon.penalties import penalty_names
from tikhon.regularizer.terms import Term
from tikhon.strengths.schedules import Linear, Recorded
from tikhon.training.recipe import Auto, Recipe

RECIPES = {
    "empty": Recipe(),
    "article": Recipe({"fc1.weight": tk.L1(1e-4), "*": tk.L2(1e-3)}, dropout=0.5),
    "terms": Recipe(
        {"*": [Term(tk.GroupLasso(1e-3), rows="in"), Term(tk.L2(0.1), how="decoupled")]}
    ),
    "settings": Recipe(tk.MCP(1e-3, gamma=2.5)),
    "weights": Recipe(tk.L1(0.5, weights=torch.tensor([1.0, 2.0]))),
    "schedule": Recipe({"*": Term(tk.L1(), strength=Linear(0.0, 1e-3, steps=100))}),
    "recorded": Recipe({"*": Term(tk.L1(), strength=Recorded((0.0, 1e-3), steps=100))}),
    "auto": Recipe({"*": Term(tk.L2(), strength=Auto())}),
    "constraint": Recipe({"fc1.weight": tk.MaxNorm(2.0), "*": tk.NonNegative()}),
    "rates": Recipe(dropout={"fc*": 0.25}, input_noise=0.1),
    "all": Recipe(
        tk.ElasticNet(1e-3, 0.7), dropout=0.1, label_smoothing=0.1, confidence_penalty=0.2,
        r_drop=0.3, mixup=0.4, input_noise=0.5, clip_norm=1.0, clip_value=2.0, clip_adaptive=0.01,
        averaging="ema", ema_decay=0.9, early_stopping=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_recipes_survive_a_file(tmp_path, name, suffix):
    recipe = RECIPES[name]
    recipe.save(tmp_path / f"r.{suffix}")
    again = Recipe.load(tmp_path / f"r.{suffix}")
    assert again == recipe and hash(again) == hash(recipe)
    assert again.to_dict() == recipe.to_dict()


def test_the_file_reads_like_a_recipe():
    text = RECIPES["article"].to_toml()
    assert tomllib.loads(text) == {
        "dropout": 0.5,
        "penalties": [
            {"pattern": "fc1.weight", "penalty": "l1", "strength": 1e-4, "how": "objective"},
            {"pattern": "*", "penalty": "l2", "strength": 1e-3, "how": "objective"},
        ],
    }


def test_recipes_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["all"].dropout = 0.9
    assert RECIPES["all"] != RECIPES["article"]


def test_every_public_penalty_has_a_name_and_survives():
    names = penalty_names()
    assert {"l1", "l2", "elastic_net", "group_lasso", "mcp", "max_norm", "l_inf"} <= set(names)
    assert all(issubclass(kind, tk.Penalty) for kind in names.values())


@pytest.mark.parametrize(
    "plain, message",
    [
        ({"droput": 0.1}, "did you mean 'dropout'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), received 1.0"),
        ({"dropout": {"fc*": -0.1}}, "dropout must be in"),
        ({"mixup": float("nan")}, "mixup must be finite and >= 0"),
        ({"mixup": 1.0, "cutmix": 1.0}, "choose one of them"),
        ({"clip_norm": 0}, "clip_norm must be > 0"),
        ({"label_smoothing": "much"}, "label_smoothing must be"),
        ({"averaging": "emma"}, "did you mean 'ema'"),
        ({"early_stopping": 0}, "early_stopping must be > 0"),
        ({"penalties": {"*": "l1"}}, "must be a list of tables"),
        ({"penalties": [{"penalty": "lasso"}]}, "unknown penalty 'lasso'"),
        ({"penalties": [{"penalty": "l1", "strength": -1.0}]}, "-1.0"),
        ({"penalties": [{"penalty": "l1", "strength": "1e-3"}]}, 'number >= 0 or "auto"'),
        ({"penalties": [{"penalty": "l1", "gama": 3}]}, "unknown setting of l1 'gama'"),
        (
            {"penalties": [{"penalty": "l1", "strength": {"kind": "os.system"}}]},
            "kind of strength",
        ),
    ],
)
def test_what_is_wrong_is_named(plain, message):
    with pytest.raises(InputError, match=message):
        Recipe.from_dict(plain)


def test_files_that_are_not_recipes(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("dropout = 0.5\ndropout = 0.6\n")
    with pytest.raises(InputError, match=r"r.toml.*line 2"):
        Recipe.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.load(tmp_path / "absent.toml")
    for name, text in (("r.json", "3"), ("s.json", "null"), ("config.json", "[1]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=name):
            Recipe.load(tmp_path / name)


def test_what_cannot_be_written_by_value_is_refused():
    with pytest.raises(InputError, match="by value"):
        Recipe({"*": Term(tk.L1(), strength=lambda step: 0.1)}).to_dict()
    with pytest.raises(InputError, match="text patterns"):
        Recipe({torch.nn.Linear: tk.L1(0.1)}).to_dict()
