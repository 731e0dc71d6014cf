import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raekit.config import from_dict, to_dict
from raekit.distributed import World
from raekit.distributed.sharding import full_state, shard
from raekit.errors import UserError
from raekit.models.discriminator import (
    Dino,
    Discriminator,
    DiscriminatorConfig,
    SpectralConv1d,
    adaptive_weight,
    dino,
    discriminator_loss,
    generator_loss,
    load_backbone,
)
from raekit.models.encoders import Encoder
from raekit.models.vit import ViT, ViTConfig
from raekit.weights import load_strict
from tests.discriminator_keys import discriminator_state

VIT = ViTConfig(image_size=16, patch_size=4, width=32, depth=3, heads=2)
CONFIG = DiscriminatorConfig(backbone="tiny", blocks=(0, 2), kernel_size=5)
VARIANTS = pytest.mark.parametrize("norm", ["instance", "group"])
SPECTRAL = pytest.mark.parametrize("spectral", [True, False])


def tiny_discriminator(seed: int = 0, **changes: Any) -> Discriminator:
    """Make a discriminator for 16-pixel images, with a 4 x 4 grid and three heads."""
    torch.manual_seed(seed)
    return Discriminator(replace(CONFIG, **changes), Encoder("tiny", VIT.spec, ViT(VIT)))


def published_heads(channels: int, count: int, kernel_size: int, norm: str, spectral: bool) -> nn.ModuleList:
    """Build heads from torch's own layers, with the tensor names of the published discriminator."""

    class Residual(nn.Module):
        def __init__(self, fn: nn.Module) -> None:
            super().__init__()
            self.fn = fn

        def forward(self, x: Tensor) -> Tensor:
            return (self.fn(x) + x) / 2**0.5

    def conv(out: int, size: int) -> nn.Module:
        layer = nn.Conv1d(channels, out, size, padding=size // 2, padding_mode="circular")
        return nn.utils.spectral_norm(layer, eps=1e-12) if spectral else layer

    def block(size: int) -> nn.Sequential:
        kind = (
            nn.InstanceNorm1d(channels, 1e-6, affine=True) if norm == "instance" else nn.GroupNorm(32, channels, 1e-6)
        )
        return nn.Sequential(conv(channels, size), kind, nn.LeakyReLU(0.2))

    return nn.ModuleList(nn.Sequential(block(1), Residual(block(kernel_size)), conv(1, 1)) for _ in range(count))


@VARIANTS
@SPECTRAL
@pytest.mark.parametrize("kernel_size", [1, 3, 9])
def test_published_heads_are_read_and_give_their_logits(norm: Any, spectral: bool, kernel_size: int):
    model = tiny_discriminator(norm=norm, spectral_norm=spectral, kernel_size=kernel_size)
    heads = published_heads(32, 3, kernel_size, norm, spectral)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.5)
    images = torch.rand(2, 3, 16, 16)
    features = model.backbone.features(images, (2, 0, 2))
    for head, x in zip(heads, features, strict=True):
        head.train()(x.mT)  # estimates the singular vectors
    expected = torch.cat([head.eval()(x.mT).flatten(1) for head, x in zip(heads, features, strict=True)], dim=1)
    for prefix in ("", "heads."):
        load_strict(model, discriminator_state(heads.state_dict(prefix=prefix)), "published")
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-5)


def test_a_published_state_that_does_not_fit_is_refused():
    state = published_heads(32, 3, 5, "instance", True).state_dict()
    state["1.3.bias"] = state.pop("1.2.bias")
    with pytest.raises(UserError, match=r"missing heads\.1\.out\.bias; unexpected heads\.1\.3\.bias"):
        load_strict(tiny_discriminator(), discriminator_state(state), "published")


def test_the_first_head_judges_the_last_block_and_the_others_those_of_the_config():
    model = tiny_discriminator().eval()
    images = torch.rand(2, 3, 16, 16)
    logits = model(images).unflatten(1, (3, 16))
    assert logits.dtype == torch.float32
    for head, block, found in zip(model.heads, (2, 0, 2), logits.unbind(1), strict=True):
        x = model.backbone.features(images, (block,))[0]
        torch.testing.assert_close(found, head(x.mT))


@VARIANTS
def test_an_image_is_judged_alike_in_any_batch(norm: Any):
    model = tiny_discriminator(norm=norm).eval()
    images = torch.rand(3, 3, 16, 16)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-5)


def test_the_convolution_is_circular():
    head = tiny_discriminator().eval().heads[0]
    features = torch.randn(2, 32, 16)
    rolled = head(features.roll(3, dims=2))
    torch.testing.assert_close(rolled, head(features).roll(3, dims=1), rtol=1e-4, atol=1e-5)


def test_the_backbone_is_frozen_and_not_saved_but_moved_along():
    model = tiny_discriminator()
    assert {key.split(".")[0] for key in model.state_dict()} == {"heads"}
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"heads"}
    assert list(dict(model.named_children())) == ["heads"]
    model.double()
    assert {p.dtype for p in model.backbone.parameters()} == {torch.float64}
    twin = copy.deepcopy(model).float()
    assert {p.dtype for p in twin.backbone.parameters()} == {torch.float32}
    assert {p.dtype for p in model.backbone.parameters()} == {torch.float64}


def test_gradients_reach_the_heads_and_the_images_through_the_backbone():
    model = tiny_discriminator()
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    generator_loss(model(images)).backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_power_iteration_runs_in_training_mode_alone():
    model = tiny_discriminator()
    images = torch.rand(1, 3, 16, 16)
    for layer in model.modules():
        if isinstance(layer, SpectralConv1d):
            nn.init.normal_(layer.weight)
    before = copy.deepcopy(model.state_dict())
    first = model.eval()(images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(images), first)
    model.train()(images)
    changed = {
        key.rsplit(".", 1)[1] for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {"u", "v"}


def test_the_spectral_norm_is_the_largest_singular_value():
    layer = SpectralConv1d(6, 4, 3, padding=1)
    sigma = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
    x = torch.randn(2, 6, 8)
    for _ in range(50):
        layer.train()(x)
    torch.testing.assert_close(
        layer.eval()(x), F.conv1d(x, layer.weight / sigma, layer.bias, padding=1), rtol=1e-4, atol=1e-5
    )
    fresh = SpectralConv1d(6, 4, 3).eval()
    estimate = fresh.u @ fresh.weight.flatten(1) @ fresh.v
    assert estimate > 0.8 * torch.linalg.matrix_norm(fresh.weight.flatten(1), 2)


def test_gradients_of_a_spectral_convolution():
    layer = SpectralConv1d(3, 2, 3, padding=1, padding_mode="circular").double().eval()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.weight))


def test_two_forwards_may_share_a_backward():
    # The losses on real and on generated images share one, and each forward pass makes a power iteration.
    model = tiny_discriminator()
    loss = discriminator_loss(model(torch.rand(1, 3, 16, 16)), model(torch.rand(1, 3, 16, 16)))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_under_autocast_the_logits_stay_float32():
    model, images = tiny_discriminator(), torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images)
    assert rough.dtype == torch.float32
    twin = tiny_discriminator().train()
    twin(images)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    exact = model.eval()(images)
    assert (rough - exact).norm() / exact.norm() < 0.1
    assert not torch.equal(rough, exact)


def dino_state(width: int = 64, depth: int = 3, patch: int = 4, grid: int = 3) -> dict[str, Tensor]:
    """Make a random DINO checkpoint with a final norm and a nonzero key bias."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid**2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for index in range(depth):
        sizes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        sizes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, (out, inner) in sizes.items():
            shapes |= {f"blocks.{index}.{name}.weight": (out, inner), f"blocks.{index}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{index}.{name}.weight": (width,), f"blocks.{index}.{name}.bias": (width,)}
    torch.manual_seed(1)
    return {key: (0.3 if len(shape) < 2 else 0.1) * torch.randn(shape) for key, shape in shapes.items()}


def dino_outputs(images: Tensor, state: dict[str, Tensor], heads: int) -> list[Tensor]:
    """Compute the patch tokens after each block by definition, with ImageNet's colours and tanh-GELU."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d((images - mean) / std, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[3])
    x = torch.cat([state["cls_token"].repeat(len(x), 1, 1), x.flatten(2).mT], 1) + state["pos_embed"]
    outputs = []
    for index in range(len(state)):
        p = {k.removeprefix(f"blocks.{index}."): v for k, v in state.items() if k.startswith(f"blocks.{index}.")}
        if not p:
            return outputs

        def linear(x: Tensor, name: str, p: dict[str, Tensor] = p) -> Tensor:
            return x @ p[f"{name}.weight"].mT + p[f"{name}.bias"]

        def norm(x: Tensor, name: str, p: dict[str, Tensor] = p) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

        q, k, v = (
            part.unflatten(2, (heads, -1)).transpose(1, 2) for part in linear(norm(x, "norm1"), "attn.qkv").chunk(3, 2)
        )
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), "attn.proj")
        hidden = linear(norm(x, "norm2"), "mlp.fc1")
        gelu = hidden / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
        x = x + linear(gelu, "mlp.fc2")
        outputs.append(x[:, 1:])
    raise AssertionError


def test_a_dino_checkpoint_gives_the_outputs_of_its_blocks():
    state = dino_state(width=128)
    model = dino(state, "file")
    assert (model.width, len(model.blocks), model.image_size) == (128, 3, 12)
    images = torch.rand(2, 3, 20, 30)
    expected = dino_outputs(F.interpolate(images, (12, 12), mode="bilinear"), state, heads=2)
    for ours, theirs in zip(model.features(images, (0, 2, 1)), (expected[i] for i in (0, 2, 1)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())


def test_the_key_bias_is_zeroed():
    state = dino_state()
    before = state["blocks.0.attn.qkv.bias"].clone()
    bias = dino(state, "file").state_dict()["blocks.0.attention.qkv.bias"]
    assert bias[64:128].abs().max() == 0
    assert torch.equal(torch.cat([bias[:64], bias[128:]]), torch.cat([before[:64], before[128:]]))
    assert torch.equal(state["blocks.0.attn.qkv.bias"], before)


def change(**changes: Tensor | None) -> dict[str, Tensor]:
    state: dict[str, Any] = dino_state() | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "not a DINO ViT: needs only tensors, including pos_embed"),
        (change(patch_embed__proj__weight=torch.zeros(60, 3, 4, 4)), "width divisible by 64"),
        (change(pos_embed=None), r"pos_embed \(1, 1 \+ N, D\)"),
        (change(pos_embed=torch.zeros(1, 0, 64)), "at least one patch"),
        (dino_state() | {"epoch": 3}, "needs only tensors"),
        (change(cls_token=None), "missing cls_token"),
        (change(blocks__1__mlp__fc2__bias=None), r"missing blocks\.1\.mlp\.2\.bias"),
        (change(head__weight=torch.zeros(2)), r"unexpected head\.weight"),
        (change(pos_embed=torch.zeros(1, 12, 64)), r"positions is \(1, 12, 64\), expected \(1, 10, 64\)"),
    ],
)
def test_a_faulty_dino_checkpoint_is_refused(state: dict[str, Tensor], message: str):
    with pytest.raises(UserError, match=rf"dino\.pth: .*{message}"):
        dino(state, "dino.pth")


def test_a_file_of_dino_is_a_backbone(tmp_path: Path):
    torch.save({key: value.half() for key, value in dino_state().items()}, tmp_path / "dino.pth")
    backbone = load_backbone(str(tmp_path / "dino.pth"))
    assert isinstance(backbone, Dino)
    model = Discriminator(DiscriminatorConfig(blocks=(1,), norm="group"), backbone)
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 2 * 9)


def test_the_builtin_encoder_is_a_backbone():
    model = Discriminator(DiscriminatorConfig(blocks=(0, 1, 2, 3)), load_backbone("builtin:vit-tiny"))
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5 * 64)


def test_the_published_backbone_is_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"hf download nyu-visionx/RAE-collections discs/dino_vit_small_patch8_224\.pth"
    ):
        load_backbone("dino-s8")
    with pytest.raises(UserError, match="encoder nothing: no such folder"):
        load_backbone("nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (0, 3)}, r"discriminator\.blocks: tiny has no block 3; its blocks are 0 to 2"),
        ({"blocks": (2, 0)}, r"discriminator\.blocks: \(2, 0\) must be increasing"),
        ({"blocks": (1, 1)}, r"discriminator\.blocks: \(1, 1\) must be increasing"),
        ({"blocks": (-1, 1)}, r"discriminator\.blocks: \(-1, 1\) must be increasing and not negative"),
        ({"kernel_size": 4}, r"discriminator\.kernel_size: 4 must be odd"),
        ({"kernel_size": -1}, r"discriminator\.kernel_size: -1 must be odd and positive"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        tiny_discriminator(**changes)


def test_groups_need_a_width_that_they_divide():
    vit = replace(VIT, width=48)
    with pytest.raises(UserError, match=r"discriminator\.norm: group needs a width divisible by 32, but tiny has 48"):
        Discriminator(replace(CONFIG, norm="group"), Encoder("tiny", vit.spec, ViT(vit)))


def test_no_further_blocks():
    assert tiny_discriminator(blocks=())(torch.rand(1, 3, 16, 16)).shape == (1, 16)


def test_the_config_goes_through_json():
    assert from_dict(DiscriminatorConfig, to_dict(CONFIG), "config.json") == CONFIG


REAL, FAKE = torch.tensor([[0.5, 2.0]]), torch.tensor([[-3.0, 1.0]])


def test_losses():
    assert discriminator_loss(REAL, FAKE) == pytest.approx(0.5 * ((0.5 + 0) / 2 + (0 + 2) / 2))
    log = (1 + torch.tensor([-0.5, -2.0, -3.0, 1.0]).double().exp()).log()
    assert discriminator_loss(REAL, FAKE, "softplus").item() == pytest.approx(log.sum().item() / 4)
    assert generator_loss(FAKE) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_the_losses_pull_real_up_and_fake_down(kind: Any):
    real, fake = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
    discriminator_loss(real, fake, kind).backward()
    assert real.grad is not None
    assert (real.grad < 0).all()
    assert fake.grad is not None
    assert (fake.grad > 0).all()


def test_adaptive_weight():
    def weight(reconstruction: float, adversarial: float, **options: float) -> float:
        return adaptive_weight(torch.tensor(reconstruction), torch.tensor(adversarial), **options).item()

    assert weight(2.0, 4.0) == pytest.approx(0.5)
    assert weight(2.0, 0.0) == 1e4
    assert weight(1e-3, 0.0) == pytest.approx(1e3)
    assert weight(0.0, 0.0) == 0
    assert weight(2.0, 0.5, maximum=3.0) == 3
    assert not adaptive_weight(torch.ones((), requires_grad=True), torch.ones(())).requires_grad


def train(world: World, steps: int) -> tuple[dict[str, Tensor], float]:
    """Train for `steps` steps on a batch of four that the processes share; return the weights and the last loss."""
    model = tiny_discriminator()
    shard(model, list(model.heads), world)
    # Not Adam: it would turn the rounding errors in the gradients of biases before a norm into steps of full length.
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = torch.zeros(())
    for step in range(steps):
        torch.manual_seed(step)
        real, fake = (images[world.rank :: world.size] for images in torch.rand(2, 4, 3, 16, 16))
        loss = discriminator_loss(model(real), model(0.8 * fake))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: value.clone() for key, value in full_state(model).items()}, float(
        world.sum(loss.detach()) / world.size
    )


def test_two_processes_train_the_same_discriminator_as_one(run_ranks: Callable[..., Sequence[Any]]):
    (first, loss), (second, _) = run_ranks(train, 2, 5)
    alone, expected = train(World(), 5)
    assert first.keys() == second.keys() == alone.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert loss == pytest.approx(expected, rel=1e-5)
    for key, value in alone.items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6)
