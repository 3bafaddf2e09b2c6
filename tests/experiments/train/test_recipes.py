"""Tests that every recipe is valid, that options override it, and that what is wrong in a file is named."""

from pathlib import Path

import pytest

from experiments.errors import ConfigError
from experiments.train.config import Config, validate
from experiments.train.recipes import FOLDER, defaults, read

RECIPES = sorted(path.stem for path in FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid(name: str) -> None:
    config = defaults(["--recipe", name])
    validate(config)
    assert config != Config() and defaults([f"--recipe={name}"]) == config
    assert f"--recipe {name} " in (FOLDER / f"{name}.toml").read_text(), "the file says its command"


def test_without_a_recipe_the_defaults_stay() -> None:
    assert defaults([]) == Config()
    assert defaults(["--smoke"]).training.epochs == 1


def test_the_smaller_defaults_of_smoke_come_on_top() -> None:
    config = defaults(["--recipe", "resnet50", "--smoke"])
    assert (config.training.model, config.training.epochs, config.training.width) == ("resnet50", 1, 8)


WRONG = {
    "is no TOML": "training = [",
    "has the section [trainings]: expected training, hardware, files": "[trainings]\nlr = 1\n",
    "[training] has 'rate': expected names of options": "[training]\nrate = 1\n",
    "[training] has batch-size = '8': expected int": '[training]\nbatch-size = "8"\n',
    "[training] has flip = 1: expected bool": "[training]\nflip = 1\n",
    "[files] has out = 3: expected Path or NoneType": "[files]\nout = 3\n",
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(WRONG[message])
    with pytest.raises(ConfigError) as error:
        defaults(["--recipe", str(file)])
    assert message in str(error.value) and str(file) in str(error.value)


def test_values_take_the_types_of_the_options(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[training]\nlr = 1\nbn-group = 2\nmodel = "resnet20"\n[files]\nout = "here"\n')
    config = read(Config(), file)
    assert (config.training.lr, config.training.bn_group, config.files.out) == (1, 2, Path("here"))


def test_an_unknown_recipe_is_answered_by_the_known() -> None:
    with pytest.raises(ConfigError, match=f"--recipe resnet5: expected one of {', '.join(RECIPES)}, or"):
        defaults(["--recipe", "resnet5"])
