import dataclasses
import re
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raekit import recipes
from raekit.config import from_dict, to_dict
from raekit.errors import UserError
from raekit.formats.releases import DENOISERS
from raekit.hub import ASSETS
from raekit.models.decoder import Decoder, DecoderConfig
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig
from raekit.models.encoders import load_encoder
from raekit.models.registry import LAYERS, REGISTRY, LayersConfig, grid_of
from raekit.stages.decoder_losses import PerceptualConfig
from raekit.stages.generation import GenerationConfig
from raekit.stages.reconstruction import ReconstructionConfig
from raekit.stages.run import StageConfig
from raekit.training.optim import by_muon, learning_rate

EVERY = pytest.mark.parametrize("name", recipes.names())


def leaves(values: object, path: str = "") -> list[str]:
    """Return the dotted names of all values in nested dicts."""
    if isinstance(values, dict):
        return [leaf for key, value in values.items() for leaf in leaves(value, f"{path}.{key}" if path else key)]
    return [path]


def test_the_recipes_of_the_built_in_models_are_there():
    assert {"emoji_encoder", "emoji_decoder", "emoji_dit_dh"} <= set(recipes.names())


@EVERY
def test_a_recipes_config_goes_through_json(name):
    config = recipes.find(name).config
    assert isinstance(config, StageConfig)
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
    if config.optim.decay != "constant" and not name.startswith(("dit_dh_", "raev2_")):
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
    """The line names a built-in model, a page of results, published figures, or says that no figures exist."""
    match = re.search(r"^Reproduces: +(\S.*)", recipes.find(name).about, re.MULTILINE)
    assert match
    if match[1].startswith("src/"):
        folder = ASSETS.parents[2] / match[1].split()[0]
        assert folder.parent == ASSETS or ASSETS in folder.parents
    elif match[1].startswith("docs/"):
        assert (ASSETS.parents[2] / match[1].split()[0].rstrip(",")).is_file()
    else:
        assert re.match(r"r?FID \d+\.\d+.*\((paper|RAE v2)|no figure is published|nothing yet", match[1])


def test_published_schedules_of_stage_1():
    """16 epochs of 2502 steps; the discriminator trains from epoch 6 on, and joins the loss in epoch 8."""
    for name in recipes.names():
        config = recipes.find(name).config
        if isinstance(config, ReconstructionConfig) and not config.encoder.startswith("builtin:"):
            assert config.adversarial
            assert config.train.steps == 16 * 2502
            assert (config.adversarial.discriminator_start, config.adversarial.start) == (6 * 2502, 8 * 2502)


LAST = LayersConfig()


@pytest.mark.parametrize(
    ("name", "encoder", "size", "patch", "width", "noise", "layers", "output", "figures"),
    [
        ("dinov2b_decoder_b", "dinov2-b", None, 16, 768, 0.0, LAST, "encoder-colours", "rFID 0.58"),
        ("dinov2b_decoder_l", "dinov2-b", None, 16, 1024, 0.0, LAST, "encoder-colours", "rFID 0.50"),
        (
            "dinov2b_decoder_xl",
            "dinov2-b",
            None,
            16,
            1152,
            0.8,
            LAST,
            "encoder-colours",
            "rFID 0.57",
        ),
        ("siglip2b_decoder_xl", "siglip2-b", None, 16, 1152, 0.8, LAST, "encoder-colours", "rFID 0.53"),
        ("mae_decoder_xl", "mae-b", None, 16, 1152, 0.8, LAST, "encoder-colours", "rFID 0.16"),
        ("dinov2b_512_direct", "dinov2-b", 448, 16, 1152, 0.8, LAST, "encoder-colours", "rFID 0.53"),
        ("dinov2b_512_upsample", "dinov2-b", None, 32, 1152, 0.8, LAST, "encoder-colours", "rFID 0.97"),
        ("dinov3l_k1_decoder_xl", "dinov3-l", None, 16, 1152, 0.8, LAYERS["k1"], "pixels", "rFID 0.60, PSNR 18.9"),
        ("dinov3l_k7_decoder_xl", "dinov3-l", None, 16, 1152, 0.8, LAYERS["k7"], "pixels", "rFID 0.29, PSNR 22.6"),
        ("dinov3l_k23_decoder_xl", "dinov3-l", None, 16, 1152, 0.8, LAYERS["k23"], "pixels", "rFID 0.18, PSNR 27.0"),
    ],
)
def test_published_settings_of_stage_1(name, encoder, size, patch, width, noise, layers, output, figures):
    recipe = recipes.find(name)
    config = recipe.config
    assert isinstance(config, ReconstructionConfig)
    assert (config.encoder, config.encoder_size, config.layers, config.output) == (encoder, size, layers, output)
    decoder = {768: (12, 12, 3072), 1024: (24, 16, 4096), 1152: (28, 16, 4096)}[width]
    found = config.decoder
    assert (found.width, found.depth, found.heads, found.hidden, found.patch_size) == (width, *decoder, patch)
    assert (config.noise, config.noise_law) == (noise, "uniform")
    assert (config.data.image_size, config.data.crop) == (512 if "512" in name else 256, "random")
    assert (config.train.batch_size, config.train.precision, config.ema) == (512, "tf32", (0.9978,))
    assert config.train.micro_batch == "auto"
    assert config.adversarial
    assert config.perceptual == PerceptualConfig(weight=1.0, start=0)
    assert config.adversarial.discriminator.backbone == "dino-s8"
    assert (config.adversarial.weight, config.adversarial.max_weight, config.adversarial.loss) == (0.75, 1e4, "hinge")
    for optim in (config.optim, config.adversarial.optim):
        assert (optim.betas, optim.weight_decay, optim.clip) == ((0.5, 0.9), 0.0, 0.0)
        rates = [learning_rate(optim, epoch * 2502) for epoch in (0, 1, 16)]
        assert rates == pytest.approx([2e-4, 2e-4, 2e-5])
    assert figures in recipe.about


def generation(name: str) -> GenerationConfig:
    config = recipes.find(name).config
    assert isinstance(config, GenerationConfig)
    return config


BASELINES = ["pixel_dit_xl", "sdvae_dit_xl"]
PUBLISHED = [name for name in recipes.names() if name.startswith(("dit_", "raev2_"))] + BASELINES
CONSTANT_RATE = ["dit_xl_dinov2s", *BASELINES]


def test_the_published_recipes_of_stage_2_are_there():
    sizes = {f"dit_dh_{size}_dinov2b_256" for size in "sblx"} - {"dit_dh_x_dinov2b_256"}
    raev2 = {f"raev2_k{k}_256" for k in (1, 7, 23)}
    assert {*PUBLISHED} == {*sizes, *raev2, "dit_dh_xl_dinov2b_256", "dit_dh_xl_dinov2b_512", *CONSTANT_RATE}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_of_stage_2(name):
    config = generation(name)
    epoch = 1_281_167 // 1024
    assert (config.train.batch_size, config.optim.lr, config.optim.clip) == (1024, 2e-4, 1.0)
    assert config.train.micro_batch == "auto"
    assert (config.optim.betas, config.optim.weight_decay, config.class_dropout) == ((0.9, 0.95), 0.0, 0.1)
    assert (config.data.crop, config.data.flip) == ("center", True)
    assert config.ema == ((0.9999,) if name in CONSTANT_RATE else (0.9995,))
    epochs = {"dit_dh_xl_dinov2b_512": 400, "dit_dh_xl_dinov2b_256": 800, "dit_xl_dinov2s": 800}
    assert config.train.steps == epochs.get(name, 80) * epoch
    rates = {step // epoch: learning_rate(config.optim, step) for step in (0, 24 * epoch, 39 * epoch, 50 * epoch)}
    if name.startswith("raev2"):
        assert rates[0] == rates[24] == 2e-4
        assert rates[39] == pytest.approx(2e-4 - 14 / 25 * 1.8e-4)
        assert rates[50] == pytest.approx(2e-5)
        assert (config.optim.method, config.time_law) == ("muon", "logit-normal")
    else:
        assert rates[0] == rates[39] == 2e-4
        assert (rates[50] == 2e-4) == (name in CONSTANT_RATE)
        assert (config.optim.method, config.time_law) == ("adamw", "uniform")


@pytest.mark.parametrize(
    ("name", "latent", "millions"),
    [
        ("dit_dh_s_dinov2b_256", (768, 16, 16), 196.5),
        ("dit_dh_b_dinov2b_256", (768, 16, 16), 294.3),
        ("dit_dh_l_dinov2b_256", (768, 16, 16), 621.7),
        ("dit_dh_xl_dinov2b_256", (768, 16, 16), 838.7),
        ("dit_xl_dinov2s", (384, 16, 16), 676.4),
    ],
)
def test_published_sizes_of_stage_2(name, latent, millions):
    config = DenoiserConfig(**vars(generation(name).denoiser), channels=latent[0], grid=latent[1:])
    with torch.device("meta"):
        model = Denoiser(config)
    # The published count includes the fixed table of positions.
    table = latent[1] * latent[2] * config.backbone.width
    assert (sum(p.numel() for p in model.parameters()) + table) / 1e6 == pytest.approx(millions, abs=0.05)


LATENTS = {"builtin:emoji": (192, 8, 8), "rae-dinov2-b-512": (768, 32, 32), "runs/rae-dinov2-s": (384, 16, 16)}
LATENTS |= {"vae:stabilityai/sd-vae-ft-ema": (4, 32, 32), "pixels": (3, 256, 256), "rae-dinov2-b": (768, 16, 16)}
LATENTS |= {f"raev2-dinov3-l-k{k}": (1024, 16, 16) for k in (1, 7, 23)}


@EVERY
def test_a_recipe_tells_its_size_memory_and_cost(name):
    recipe = recipes.find(name)
    config = recipe.config
    said = float(re.match(r"([\d.]+) M parameters", recipe.size)[1])  # type: ignore[index]
    assert recipe.memory
    assert recipe.cost
    with torch.device("meta"):
        if isinstance(config, GenerationConfig):
            channels, *grid = LATENTS[config.autoencoder]
            classes = 9 if config.data.source == "emoji" else 1000
            sizes = {"channels": channels, "grid": tuple(grid), "num_classes": classes}
            model = Denoiser(DenoiserConfig(**vars(config.denoiser), **sizes))
        elif isinstance(config, ReconstructionConfig) and (spec := REGISTRY.get(config.encoder)):
            grid = grid_of(spec, config.encoder, config.encoder_size)
            model = Decoder(DecoderConfig(token_dim=spec.width, grid=grid, **vars(config.decoder)))
        else:
            return
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(said, abs=0.8 if said > 10 else 0.05)  # published with a fixed table
    if state := re.match(r"([\d.]+) GiB of state", recipe.memory):  # stage 1 also has 0.1 GiB for the discriminator
        muon = sum(matrix.numel() for matrix in by_muon(config.optim, model))  # has one moment, where AdamW has two
        assert 4 * (count * (4 + len(config.ema)) - muon) / 2**30 == pytest.approx(float(state[1]), abs=0.17)


def test_recipes_of_released_denoisers_make_what_is_released():
    for recipe, name in (
        ("dit_dh_xl_dinov2b_256", "dit-dh-xl-256"),
        ("dit_dh_s_dinov2b_256", "dit-dh-s-256-ep14"),
        ("dit_dh_xl_dinov2b_512", "dit-dh-xl-512"),
        ("raev2_k7_256", "raev2-k7-256"),
    ):
        config, release = generation(recipe), DENOISERS[name]
        assert config.autoencoder == release.autoencoder
        released = {field: getattr(release.config, field) for field in vars(config.denoiser)}
        assert released == vars(config.denoiser)
    for k in (1, 7, 23):
        assert generation(f"raev2_k{k}_256").autoencoder == f"raev2-dinov3-l-k{k}"


def test_the_two_recipes_of_emoji_cost_the_same():
    ours, theirs = generation("emoji_raev2"), generation("emoji_dit_dh")
    assert (ours.train, ours.data, ours.ema) == (theirs.train, theirs.data, theirs.ema)
    costs = []
    for config in (ours, theirs):
        model = Denoiser(DenoiserConfig(**vars(config.denoiser), channels=192, grid=(8, 8), num_classes=9))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 192, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long), with_base=True)
        costs.append(counter.get_total_flops())
    assert costs[0] == pytest.approx(costs[1], rel=0.05)


def test_a_variant_is_a_replacement():
    config = recipes.find("emoji_encoder").config
    variant = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=5))
    assert (variant.train.steps, variant.data) == (5, config.data)
    assert recipes.find("emoji_encoder").config == config


def test_a_recipe_is_trained_from_python(images, tmp_path):
    small = {"data__source": images, "data__image_size": 16, "encoder__image_size": 16, "encoder__patch_size": 4}
    small |= {"encoder__width": 16, "encoder__depth": 1, "encoder__heads": 2, "decoder_width": 16}
    small |= {"train__batch_size": 4, "train__precision": "fp32", "train__log_every": 1}
    seen = []
    artifact = recipes.train(
        "emoji_encoder", tmp_path / "run", report=lambda step, metrics: seen.append(step), train__steps=2, **small
    )
    assert seen == [1, 2]
    assert load_encoder(str(artifact)).spec.width == 16
    with pytest.raises(UserError, match="belongs to a run with a different config"):
        recipes.train("emoji_encoder", tmp_path / "run", train__steps=3, **small)
    with pytest.raises(UserError, match=r"train: train\.stepps: "):
        recipes.train("emoji_encoder", tmp_path / "run", train__stepps=3)
    with pytest.raises(UserError, match="train__steps__x is not a field, because steps has none"):
        recipes.train("emoji_encoder", tmp_path / "run", train__steps__x=3)
    assert recipes.find("emoji_encoder").config.train.steps > 3


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("train", {"checkpoint_every": None}),
        ("train", {"track": "tensorboard"}),
        ("data", {"flip": "yes please"}),
    ],
)
def test_a_config_made_in_python_is_checked(part, values):
    made = getattr(recipes.find("emoji_encoder").config, part)
    with pytest.raises(UserError, match=rf"^{type(made).__name__}\.{next(iter(values))}: Input should be "):
        dataclasses.replace(made, **values)


@pytest.mark.parametrize("wrong", [None, 3])
def test_arguments_of_a_wrong_type_are_named(tmp_path, wrong: Any):
    with pytest.raises(UserError, match=f"^train: recipe {wrong} must be the name of a recipe, a recipe file or"):
        recipes.train(wrong, tmp_path / "run")
    with pytest.raises(UserError, match=f"^train: run {wrong} must be the path of a folder"):
        recipes.train("emoji_decoder", wrong)


def test_a_list_in_a_config_becomes_a_tuple():
    config = recipes.find("emoji_encoder").config
    listed: Any = [0.99, 0.5]
    assert dataclasses.replace(config, ema=listed).ema == (0.99, 0.5)


@pytest.mark.parametrize("name", ["nothing", "", "../emoji_encoder", "emoji_encoder.config"])
def test_an_unknown_recipe_is_named_with_those_that_there_are(name):
    with pytest.raises(UserError, match=re.escape(f"recipe {name!r}: no such recipe; ")):
        recipes.find(name)


@EVERY
def test_only_the_short_recipes_warm_their_averages_up(name):
    warm = {
        "emoji_encoder",
        "emoji_encoder_distilled",
        "emoji_decoder",
        "emoji_decoder_gan",
        "emoji_dit_dh",
        "emoji_raev2",
        "emoji_vae",
        "photos_256",
    }
    assert recipes.find(name).config.train.ema_warmup == (name in warm)
