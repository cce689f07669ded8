"""An option exists once: the same name in Python, in recipe files, in the shell and in a space."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer

import tikhon as tk
from tikhon import options as names
from tikhon.cli import build
from tikhon.cli.option_groups import expand_groups, given_options, option_group
from tikhon.errors import InputError
from tikhon.options import (
    FLAGS,
    STRENGTHS,
    Option,
    RecipeOptions,
    TrainingOptions,
    option,
    options_of,
    training_fields,
)
from tikhon.penalties import penalty_names
from tikhon.training.recipe import Recipe
from tikhon.training.settings import Settings

FIELDS = {name: (told, default) for name, told, default in training_fields()}
OTHER = {  # a value that is not the default
    "penalties": [{"pattern": "*", "penalty": "l1", "strength": 0.1, "how": "objective"}],
    "averaging": "ema",
    "early_stopping": 3,
    "learning_rates": {"*": 0.5},
}


@pytest.fixture(scope="module")
def shell() -> dict[str, Any]:
    group: Any = typer.main.get_command(build())
    return {p.name: p for p in group.commands["fit"].params}


def test_the_fields_are_those_of_recipe_and_settings():
    of_recipe, of_settings = ({f.name for f in dataclasses.fields(k)} for k in (Recipe, Settings))
    assert of_recipe == set(options_of(RecipeOptions))
    assert of_settings == set(options_of(TrainingOptions))
    assert len(FIELDS) == len(of_recipe) + len(of_settings), "one name, one meaning"


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_described_and_in_the_shell(name, shell):
    told, default = FIELDS[name]
    assert told.help.endswith(".") and told.panel
    flag = "penalty" if name == "penalties" else name
    assert shell[flag].help == told.help
    if name in options_of(TrainingOptions) and name != "epochs":
        assert shell[flag].default == default
    else:  # left out, the recipe file's value stands
        assert shell[flag].default is None


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_an_argument_in_python(name):
    _, default = FIELDS[name]
    where: Any = Recipe if name in options_of(RecipeOptions) else tk.fit
    parameter = inspect.signature(where).parameters[name]
    assert parameter.default == default
    words = where.__doc__.partition("Args:")[2]
    assert name in words, f"{name} is not in the docstring of {where.__name__}"


@pytest.mark.parametrize("name", options_of(RecipeOptions))
def test_every_field_of_a_recipe_is_a_key_of_its_file(name, tmp_path):
    value = OTHER.get(name, 0.5)
    recipe = Recipe.from_dict({name: value})
    recipe.save(tmp_path / "recipe.toml")
    assert Recipe.load(tmp_path / "recipe.toml").to_dict()[name] == value


@pytest.mark.parametrize("name", FIELDS)
def test_tikhon_toml_gives_every_option_another_default(name, tmp_path, monkeypatch):
    from tikhon.cli.configuration import defaults

    key = "penalty" if name == "penalties" else name.replace("_", "-")
    (tmp_path / "tikhon.toml").write_text(f'[fit]\n{key} = "1"\n')
    context: Any = typer.main.get_command(build()).make_context("tikhon", ["fit"])
    found = defaults(tmp_path / "tikhon.toml", context)
    assert found["fit"] == {key.replace("-", "_"): "1"}


@pytest.mark.parametrize("name", FIELDS)
def test_a_space_varies_a_field_or_says_what_to_do_instead(name):
    told, _ = FIELDS[name]
    x, y = torch.randn(40, 3), torch.randint(2, (40,))

    def search(**entries: Any) -> Any:
        return tk.tune(
            lambda: torch.nn.Sequential(tk.layers.Dropout(0.1), torch.nn.Linear(3, 2)),
            (x, y),
            space=tk.Space(**entries),
            budget="2runs",
            epochs=1,
            folds=0,
        )

    if isinstance(told.search, str):
        assert told.search
        with pytest.raises(InputError, match=f"does not vary '{name}': {told.search}"):
            search(**{name: 0.5})
        return
    choices = {"seed": [1, 2], "batch_size": [8, 16], "optimizer": ["sgd", "adamw"]}
    space = tk.Choice(choices[name]) if name in choices else tk.Uniform(0.1, 0.2)
    assert name in search(**{name: space}).config


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_strength_has_one_name_in_shell_and_space(name, shell):
    told = STRENGTHS[name]
    assert told.penalty in penalty_names()
    assert (name in shell) == told.flag
    assert name in tk.Space(**{name: 0.1})


def test_the_names_that_the_shell_completes_are_those_that_are_taken():
    from tikhon.comparison import NAMES as METHODS
    from tikhon.data.sources import NAMES as SOURCES
    from tikhon.models.build import NAMES as MODELS
    from tikhon.training.losses import NAMES as LOSSES
    from tikhon.training.settings import OPTIMIZERS

    kinds = penalty_names()
    followed = {name for name, kind in kinds.items() if not (kind.constraint or kind.smooth)}
    for told, taken in (
        (names.SOURCES, SOURCES),
        (names.MODELS, MODELS),
        (names.LOSSES, LOSSES),
        (names.OPTIMIZERS, OPTIMIZERS),
        (names.PENALTIES, kinds),
        (names.METHODS, METHODS),
        (names.SPARSE_PENALTIES, followed),
    ):
        assert sorted(told) == sorted(taken)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tikhon fit dig", "digits"),
        ("tikhon fit digits --optimizer ada", "adagrad adam adamw"),
        ("tikhon fit digits --loss cr", "cross_entropy"),
        ("tikhon fit digits --penalty fc1.weight=l_", "fc1.weight=l_inf"),
        ("tikhon compare digits --methods none,mix", "none,mixup"),
        ("tikhon path digits --penalty hier", "hierarchical"),
        ("tikhon tune digits --metric roc_auc_ovo_", "roc_auc_ovo_weighted"),
        ("tikhon diagnose t.py:m --data wi", "wine"),
        ("tikhon cure t.py:m --fail", ""),
    ],
)
def test_the_shell_completes_the_names(line, offered, monkeypatch, capsys):
    monkeypatch.setenv("_TIKHON_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    command: Any = typer.main.get_command(build())
    with pytest.raises(SystemExit):
        command.main([], prog_name="tikhon")
    assert sorted(capsys.readouterr().out.split()) == offered.split()


def test_every_option_has_a_panel_and_a_placeholder():
    group: Any = typer.main.get_command(build())
    for command in group.commands.values():
        for param in command.params:
            if param.param_type_name == "option" and param.name not in ("help", "install"):
                where = f"{command.name} {param.opts}"
                assert param.rich_help_panel and param.help and param.help.endswith("."), where
                assert (param.metavar == "") == bool(param.is_flag), where


def test_the_page_of_the_command_line_has_the_tables():
    """After a change: run docs/options.py."""
    import sys

    docs = Path(__file__).parents[1] / "docs"
    sys.path.insert(0, str(docs))
    try:
        from options import page
    finally:
        sys.path.remove(str(docs))
    text = (docs / "cli.md").read_text(encoding="utf-8")
    assert page(text) == text


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int = option(3, "Width.", int)
    tall: bool = option(False, "Tall.", bool)


def test_a_group_becomes_options_and_comes_back_as_one_value():
    found: list[Any] = []

    def command(
        name: str,
        shape: Annotated[Shape, option_group(Shape, without=("tall",))],
        given: Annotated[
            Any, given_options({"rate": Option("Rate.", float), "other": Option("O.")})
        ],
    ) -> None:
        """Say it."""
        found.extend((name, shape, given))

    app = typer.Typer()
    app.command()(expand_groups(command))
    parsed: Any = typer.main.get_command(app)
    parsed.main(["it", "--width", "5", "--rate", "0.5"], standalone_mode=False)
    assert found == ["it", Shape(width=5), {"rate": 0.5}]
    assert {p.name for p in parsed.params} >= {"name", "width", "rate", "other"}
    assert "tall" not in {p.name for p in parsed.params} and parsed.help == "Say it."


def test_every_option_without_a_value_is_known_as_one():
    """`parts_of` reads command lines by the list of these."""
    group: Any = typer.main.get_command(build())
    alone, valued = set(), set()
    for command in group.commands.values():
        for param in command.params:
            if param.param_type_name == "option":
                names = {*param.opts, *param.secondary_opts}
                (alone if param.is_flag else valued).update(names)
    assert alone <= FLAGS
    assert not valued & FLAGS
