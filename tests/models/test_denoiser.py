import math
from typing import Any

import pytest
import torch

from raekit.config import from_dict, to_dict
from raekit.errors import UserError
from raekit.models.conditioning import ClassCondition
from raekit.models.decoder import DecoderConfig
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import SIZES, ContextConfig, DenoiserConfig, TransformerConfig, wide_head

BACKBONE = TransformerConfig(width=16, depth=2, heads=2)
HEAD = TransformerConfig(width=24, depth=1, heads=3)


def tiny(head: TransformerConfig | None = HEAD, **changes) -> Denoiser:
    values = {"channels": 8, "grid": (3, 4), "backbone": BACKBONE, "num_classes": 5, **changes}
    return Denoiser(DenoiserConfig(head=head, **values)).eval()


def randomised(model: Denoiser) -> Denoiser:
    """With noise on every parameter, so that the zeros of the start hide nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def inputs(model: Denoiser, batch: int = 3):
    labels = torch.arange(batch) if model.label else None
    return torch.randn(batch, *model.config.latent_shape), torch.rand(batch), labels


KINDS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": None},
        {"qk_norm": True},
        {"head": None, "patch_size": 2, "grid": (4, 6), "allow_narrow": True},
        {"head": TransformerConfig(width=16, depth=1, heads=4)},
        {"num_classes": 0},
        {"norm": "layer", "mlp": "gelu", "qk_norm": True, "positions": "none", "adaln_shift": False},
        {"rotary": False, "patch_size": 2, "grid": (4, 6), "allow_narrow": True},
        {"context": ContextConfig(), "base_depth": 1, "positions": "none"},
        {"context": ContextConfig(time_tokens=1, label_tokens=2), "base_depth": 2, "head": None, "rotary": False},
        {"context": ContextConfig(), "num_classes": 0},
        {"positions": "learned"},
    ],
    ids=[
        "wide head",
        "plain",
        "qk-norm",
        "patches of 2",
        "head as wide as the backbone",
        "unconditional",
        "all switches but rotary",
        "patches of 2 and wide head, not rotary",
        "in context, with base output",
        "plain, in context, with base output",
        "unconditional in context",
        "learned positions",
    ],
)


@KINDS
def test_fresh_network_gives_exactly_zero(options: dict):
    model = tiny(**options)
    out = model(*inputs(model))
    assert out.shape == (3, *model.config.latent_shape)
    assert not out.any()


@KINDS
def test_samples_of_a_batch_do_not_mix(options: dict):
    model = randomised(tiny(**options))
    x, t, labels = inputs(model)
    whole = model(x, t, labels)
    for i in range(3):
        label = None if labels is None else labels[i : i + 1]
        assert torch.allclose(model(x[i : i + 1], t[i : i + 1], label), whole[i : i + 1], atol=1e-5)


@KINDS
def test_every_parameter_learns(options: dict):
    model = randomised(tiny(**options))
    if model.config.base_depth:
        torch.stack(model(*inputs(model), with_base=True)).square().mean().backward()
    else:
        model(*inputs(model)).square().mean().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@KINDS
def test_output_depends_on_time_and_on_the_whole_input(options: dict):
    model = randomised(tiny(**options))
    x, t, labels = inputs(model, 1)
    before = model(x, t, labels)
    assert not torch.allclose(model(x, (t + 0.5) % 1, labels), before, atol=1e-4)
    changed = x.clone()
    changed[..., 0, 0] += 1
    assert not torch.allclose(model(changed, t, labels)[..., -1, -1], before[..., -1, -1], atol=1e-6)


@pytest.mark.parametrize("context", [None, ContextConfig()], ids=["adaLN", "in context"])
def test_base_output_is_that_of_the_first_blocks(context: ContextConfig | None):
    model = randomised(tiny(context=context, base_depth=1))
    x, t, labels = inputs(model)
    full, base = model(x, t, labels, with_base=True)
    assert torch.equal(full, model(x, t, labels))
    assert not torch.allclose(full, base, atol=1e-3)
    torch.nn.init.normal_(model.get_parameter("blocks.1.mlp.w_out.weight"))
    changed, same = model(x, t, labels, with_base=True)
    assert torch.equal(same, base)
    assert not torch.allclose(changed, full, atol=1e-3)


def test_base_output_has_to_be_there():
    model = tiny()
    with pytest.raises(UserError, match=r"denoiser\.base_depth: 0, so this denoiser has no base output"):
        model(*inputs(model), with_base=True)


def test_features_stand_for_the_backbone():
    model = randomised(tiny(base_depth=2))
    x, t, labels = inputs(model)
    features = model.features(x, t, labels)
    full, base = model(x, t, labels, with_base=True)
    for block in model.blocks:
        block.forward = None  # type: ignore[method-assign]
    again = model(x, t, labels, features=features, with_base=True)
    assert torch.equal(again[0], full)
    assert torch.equal(again[1], base)
    assert not torch.allclose(model(2 * x, t, features=features), full, atol=1e-3), "the head sees the latents"


@pytest.mark.parametrize("head", [None, HEAD], ids=["plain", "wide head"])
def test_no_labels_means_the_null_class(head: TransformerConfig | None):
    model = randomised(tiny(head))
    x, t, labels = inputs(model)
    assert torch.equal(model(x, t), model(x, t, torch.full((3,), model.config.num_classes)))
    assert not torch.allclose(model(x, t), model(x, t, labels), atol=1e-4)


@pytest.mark.parametrize("context", [None, ContextConfig()])
def test_weights_of_classes_mix_their_embeddings(context: ContextConfig | None):
    model = randomised(tiny(context=context))
    x, t, labels = inputs(model)
    assert labels is not None
    weights = torch.nn.functional.one_hot(labels, 6).float()
    assert torch.allclose(model(x, t, weights), model(x, t, labels), atol=1e-6)
    none = torch.zeros(3, 6)
    none[:, 5] = 1
    assert torch.allclose(model(x, t, none), model(x, t), atol=1e-6)
    assert isinstance(model.label, ClassCondition)
    mixed = model(x, t, 0.5 * weights + 0.5 * none)
    table = model.label.weight.detach()
    with torch.no_grad():
        model.label.weight[:3] = (table[:3] + table[5]) / 2
    assert torch.allclose(mixed, model(x, t, labels), atol=1e-6)


def test_unconditional_network_has_no_labels():
    model = randomised(tiny(num_classes=0))
    x, t, labels = inputs(model)
    assert model.label is None
    assert labels is None
    assert model(x, t).any()


def on_meta(config: DenoiserConfig) -> Denoiser:
    with torch.device("meta"):
        return Denoiser(config)


def published_count(model: Denoiser) -> float:
    """Parameters in millions as the release counts them: with its table of positions and its 256 frequencies."""
    return (sum(p.numel() for p in model.parameters()) + 256 * model.config.backbone.width + 256) / 1e6


@pytest.mark.parametrize(
    ("size", "millions", "tensors"), [("S", 196.5, 190), ("B", 294.3, 190), ("L", 621.7, 334), ("XL", 838.7, 382)]
)
def test_published_sizes_of_dit_dh(size: str, millions: float, tensors: int):
    model = on_meta(DenoiserConfig(channels=768, grid=(16, 16), backbone=SIZES[size], head=wide_head()))
    assert round(published_count(model), 1) == millions
    assert len(model.state_dict()) == tensors - 5  # the release stores the table of positions and four rotary ones


@pytest.mark.parametrize(("channels", "millions"), [(768, 677.2), (384, 676.4)])
def test_published_sizes_of_lightning_dit_xl(channels: int, millions: float):
    model = on_meta(DenoiserConfig(channels=channels, grid=(16, 16), backbone=SIZES["XL"]))
    assert abs(published_count(model) - millions) <= 0.1


def test_positions_are_named():
    values = to_dict(tiny().config)
    for name in ("none", "sincos", "learned"):
        assert from_dict(DenoiserConfig, values | {"positions": name}, "test").positions == name
    for wrong in ("random", True):
        with pytest.raises(UserError, match="test: positions: "):
            from_dict(DenoiserConfig, values | {"positions": wrong}, "test")
    for wrong in (True, "Learned"):
        with pytest.raises(UserError, match="positions: Input should be 'none', 'sincos' or 'learned'"):
            tiny(positions=wrong)
    with pytest.raises(UserError, match="positions: Input should be 'sincos' or 'learned'"):
        DecoderConfig(token_dim=8, grid=(2, 2), positions="none")  # type: ignore[arg-type]


def test_sizes_are_limited_by_the_tokens_after_patching():
    large = {"channels": 3, "backbone": BACKBONE, "head": None, "allow_narrow": True}
    assert DenoiserConfig(**large, grid=(512, 512), patch_size=16).token_grid == (32, 32)
    with pytest.raises(UserError, match=r"denoiser\.tokens: 262144 must be from 1 to 65,536"):
        DenoiserConfig(**large, grid=(512, 512))
    with pytest.raises(UserError, match=r"denoiser\.token_dim: 786432 must be from 1 to 65,536"):
        DenoiserConfig(**large, grid=(512, 512), patch_size=512)


def test_large_sizes_and_heads():
    rows = {"XXL": (1280, 32, 16), "H": (1536, 32, 16), "G": (2048, 40, 16), "T": (2688, 40, 21)}
    for size, (width, depth, heads) in rows.items():
        assert SIZES[size] == TransformerConfig(width=width, depth=depth, heads=heads)
        assert wide_head(size, 4) == TransformerConfig(width=width, depth=4, heads=heads)


@pytest.mark.parametrize(("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2730), (1152, 3072), (2048, 5461)])
def test_hidden_width_of_the_mlp(width: int, hidden: int):
    backbone = TransformerConfig(width=width, depth=1, heads=4)
    model = on_meta(DenoiserConfig(channels=8, grid=(2, 2), backbone=backbone))
    assert model.state_dict()["blocks.0.mlp.w_out.weight"].shape == (width, hidden)


def test_label_embeddings_start_with_the_spread_asked_for():
    for spread in (0.02, 0.5):
        torch.manual_seed(0)
        label = tiny(num_classes=500, label_std=spread).label
        assert isinstance(label, ClassCondition)
        assert label.weight.std().item() == pytest.approx(spread, rel=0.05)
    with pytest.raises(UserError, match=r"denoiser\.label_std: -1\.0 is negative"):
        tiny(label_std=-1.0)


def test_narrow_network_is_refused_with_the_bound():
    with pytest.raises(UserError, match=r"denoiser.backbone.width: 16 is below the token dimension 32.* below 0.500 "):
        tiny(None, channels=32)
    with pytest.raises(UserError, match=r"denoiser.head.width: 24 is below the token dimension 32.* below 0.250 "):
        tiny(channels=32)
    with pytest.raises(UserError, match=r"set denoiser\.allow_narrow"):
        tiny(None, channels=5, grid=(4, 4), patch_size=2)


def test_narrow_network_can_be_had():
    assert tiny(None, channels=32, allow_narrow=True).config.token_dim == 32


def test_wide_head_makes_a_narrow_backbone_allowed():
    assert tiny(channels=24).config.output_width == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 2}, r"denoiser.patch_size: 2 does not divide the grid \(3, 4\)"),
        ({"grid": (-3, -4)}, r"denoiser.patch_size: 1 does not divide the grid \(-3, -4\)"),
        ({"grid": 8}, "DenoiserConfig.grid: Input should be a valid tuple"),
        ({"shift": 0.0}, r"denoiser.shift: 0\.0 must be positive"),
        ({"num_classes": -1}, "denoiser.num_classes: -1"),
        ({"mlp_ratio": -1.0}, r"denoiser\.mlp_ratio: -1\.0 must be positive"),
        ({"base_depth": 3}, "denoiser.base_depth: 3 must be at most denoiser.backbone.depth = 2"),
        ({"base_depth": -1}, "denoiser.base_depth: -1"),
        ({"rotary": False, "positions": "none"}, "denoiser.rotary: off, and denoiser.positions is none"),
    ],
)
def test_impossible_configurations_are_named(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_width_must_divide_into_heads():
    with pytest.raises(UserError, match="width: 18 over heads = 3"):
        TransformerConfig(width=18, depth=1, heads=3)


@pytest.mark.parametrize("name", ["time_tokens", "label_tokens"])
def test_conditioning_in_context_needs_tokens(name: str):
    with pytest.raises(UserError, match=rf"denoiser\.context\.{name}: 0 must be at least 1"):
        ContextConfig(**{name: 0})


def test_initial_weights():
    torch.manual_seed(0)
    plain, wide = (tiny(head, num_classes=1000).state_dict() for head in (None, HEAD))
    for state in (plain, wide):
        assert abs(state["label.weight"].std() - 0.02) < 0.002
        assert abs(state["time.mlp.0.weight"].std() - 0.02) < 0.002
        assert not state["embed.bias"].any()
        assert state["embed.weight"].abs().max() <= math.sqrt(6 / (8 + 16))
        modulations = [value for name, value in state.items() if "modulation" in name]
        assert len(modulations) > 4
        assert not any(value.any() for value in modulations), "adaLN-zero"
    # Xavier-uniform with zero biases in the plain network, torch's default in the wide one.
    weight = "blocks.0.mlp.w_out.weight"
    hidden = plain[weight].shape[1]
    assert plain[weight].abs().max() == pytest.approx(math.sqrt(6 / (16 + hidden)), rel=0.05)
    assert wide[weight].abs().max() == pytest.approx(math.sqrt(1 / hidden), rel=0.05)
    assert not plain["blocks.0.mlp.w_out.bias"].any()
    assert wide["blocks.0.mlp.w_out.bias"].any()
    tokens = tiny(context=ContextConfig(time_tokens=30, label_tokens=30)).state_dict()
    for name in ("time_tokens", "label_tokens"):
        assert tokens[name].std() == pytest.approx(0.02, rel=0.2)


def test_velocity_is_float32_under_autocast():
    model = randomised(tiny())
    x, t, labels = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, labels)
    assert out.dtype == torch.float32
    assert (out - model(x, t, labels)).norm() < 0.03 * out.norm()


@pytest.mark.parametrize("changed", [{}, {"context": ContextConfig()}, {"positions": "none"}])
@pytest.mark.parametrize("narrow", [False, True])
def test_the_residual_stream_under_autocast(narrow: bool, changed):
    model = randomised(tiny(**changed))
    model.narrow_residual = narrow
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].dtype))
    x, t, labels = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, labels)
    assert seen == [torch.bfloat16 if narrow else torch.float32] * len(model.blocks)
    assert (out - model(x, t, labels)).norm() < 0.05 * out.norm()


def test_times_and_labels_of_another_kind_are_rejected():
    model = tiny()
    x, t, labels = torch.zeros(3, 8, 3, 4), torch.rand(3), torch.arange(3)
    wrong: Any
    for wrong in (0.5, torch.tensor(0.5), torch.rand(2), torch.arange(3)):
        with pytest.raises(UserError, match=r"t: expected a float tensor \(3,\), a time for each of the latents, got"):
            model(x, wrong, labels)
    for wrong in (
        [0, 1, 2],
        torch.arange(2),
        torch.rand(3),
        torch.rand(3, 5),
        torch.tensor([0, 1, 6]),
        -labels,
        labels > 0,
    ):
        with pytest.raises(UserError, match=r"labels: expected ids \(3,\) from 0 to 5, or float weights \(3, 6\), got"):
            model(x, t, wrong)


@pytest.mark.parametrize("shape", [(3, 8, 4, 3), (3, 8, 2, 6), (8, 3, 4), (3, 7, 3, 4)])
def test_latents_of_another_shape_are_rejected(shape):
    model = tiny()
    for run in (model, model.features):
        with pytest.raises(UserError, match=r"latents: expected a float tensor \(B, 8, 3, 4\), got the shape"):
            run(torch.zeros(shape), torch.rand(3), torch.arange(3))
