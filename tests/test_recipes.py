import dataclasses
import re

import pytest

from raekit import recipes
from raekit.config import from_dict, to_dict
from raekit.errors import UserError
from raekit.stages.generation import GenerationConfig
from raekit.stages.reconstruction import ReconstructionConfig
from raekit.stages.representation import RepresentationConfig
from raekit.weights import ASSETS

EVERY = pytest.mark.parametrize("name", recipes.names())


def leaves(values: object, path: str = "") -> list[str]:
    """The dotted names of all values in nested dicts."""
    if isinstance(values, dict):
        return [leaf for key, value in values.items() for leaf in leaves(value, f"{path}.{key}" if path else key)]
    return [path]


def test_the_recipes_of_the_built_in_models_are_there():
    assert {"emoji_encoder", "emoji_decoder", "emoji_dit_dh"} <= set(recipes.names())


@EVERY
def test_a_recipes_config_goes_through_json(name):
    config = recipes.find(name).config
    assert isinstance(config, RepresentationConfig | ReconstructionConfig | GenerationConfig)
    assert from_dict(type(config), to_dict(config), "config.json") == config


@EVERY
def test_a_mistyped_key_is_refused_wherever_it_stands(name):
    config = recipes.find(name).config
    for path in {leaf.rpartition(".")[0] for leaf in leaves(to_dict(config))}:
        values = to_dict(config)
        inner = values
        for key in path.split(".") if path else ():
            inner = inner[key]
        inner["mistyped"] = 1
        where = f"{path}.mistyped" if path else "mistyped"
        with pytest.raises(UserError, match=rf"^config\.json: {re.escape(where)}: "):
            from_dict(type(config), values, "config.json")


@EVERY
def test_a_recipe_trains_to_the_end_of_its_schedule(name):
    config = recipes.find(name).config
    if config.optim.decay != "constant":
        assert config.optim.decay_end == config.train.steps
    assert config.train.steps >= config.train.checkpoint_every


@EVERY
def test_a_recipe_tells_what_it_is_in_one_line(name):
    recipe = recipes.find(name)
    assert recipe.name == name
    assert re.fullmatch(r"[A-Z].*\.", recipe.summary)
    assert len(recipe.summary) <= 120


@EVERY
def test_a_recipe_tells_what_it_reproduces(name):
    """A built-in model, results shown in the documentation, or published figures."""
    match = re.search(r"^Reproduces: +(\S.*)", recipes.find(name).about, re.MULTILINE)
    assert match
    if match[1].startswith("src/"):
        folder = ASSETS.parents[2] / match[1].split()[0]
        assert folder.parent == ASSETS or ASSETS in folder.parents
    elif match[1].startswith("docs/"):
        assert (ASSETS.parents[2] / match[1].split()[0].rstrip(",")).is_file()
    else:
        assert re.match(r"r?FID \d\.\d+.*\((paper, table|RAE v2)", match[1])


def test_published_schedules_of_stage_1():
    """16 epochs of 2502 steps; the discriminator trains from epoch 6 on, and is heard from epoch 8 on."""
    for name in recipes.names():
        config = recipes.find(name).config
        if isinstance(config, ReconstructionConfig) and not config.encoder.startswith("builtin:"):
            assert config.adversarial
            assert config.train.steps == 16 * 2502
            assert (config.adversarial.discriminator_start, config.adversarial.start) == (6 * 2502, 8 * 2502)


def test_a_variant_is_a_replacement():
    config = recipes.find("emoji_encoder").config
    variant = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=5))
    assert (variant.train.steps, variant.data) == (5, config.data)
    assert recipes.find("emoji_encoder").config == config


@pytest.mark.parametrize("name", ["emoji", "", "../emoji_encoder", "emoji_encoder.config"])
def test_an_unknown_recipe_is_named_with_those_that_there_are(name):
    with pytest.raises(
        UserError, match=re.escape(f"recipe {name!r}: no such recipe; there are dinov2b_512_direct, dinov2b_")
    ):
        recipes.find(name)
