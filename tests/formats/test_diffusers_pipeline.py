"""Test the folder of diffusers' RAEDiTPipeline: a round trip, the keys and the grid of times."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from raekit.errors import UserError
from raekit.flow.path import shift_factor
from raekit.flow.solvers import time_grid
from raekit.formats.conversion import convert, read
from raekit.inference.model import load
from raekit.models.autoencoder import Autoencoder, AutoencoderConfig
from raekit.models.decoder import DecoderConfig
from raekit.models.denoiser import Denoiser
from raekit.models.denoiser_config import DenoiserConfig, TransformerConfig
from raekit.models.encoders import load_encoder
from raekit.models.registry import REGISTRY, EncoderSpec

NAMES = tuple(f"name {i}, synonym" for i in range(4))
X, T, Y = torch.randn(3, 64, 16, 16), torch.tensor([0.1, 0.5, 0.95]), torch.tensor([0, 2, 1])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAEKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def encoder(encoder_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace dinov2-b by a small encoder with 16 x 16 tokens of 64 channels."""
    old = REGISTRY["dinov2-b"]
    values = {"family": old.family, "width": 64, "patch_size": 14, "image_size": 224, "prefix_tokens": 5}
    monkeypatch.setitem(REGISTRY, "dinov2-b", EncoderSpec(**values, mean=old.mean, std=old.std, hub_id=encoder_folder))


def random_denoiser(**changes: Any) -> Denoiser:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "backbone": TransformerConfig(width=48, depth=2, heads=2),
        "head": TransformerConfig(width=64, depth=1, heads=4),
    }
    shape: dict[str, Any] = {"channels": 64, "grid": (16, 16), "num_classes": 4, "class_names": NAMES}
    shape["shift"] = shift_factor((64, 16, 16))
    model = Denoiser(DenoiserConfig(**parts | shape | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def write(folder: Path, denoiser: Denoiser) -> str:
    """Write a raekit model with an autoencoder of random weights."""
    config = DecoderConfig(token_dim=64, grid=(16, 16), patch_size=4, width=24, depth=1, heads=3, hidden=40)
    torch.manual_seed(1)
    autoencoder = Autoencoder(AutoencoderConfig(encoder="dinov2-b", decoder=config), load_encoder("dinov2-b"))
    autoencoder.set_statistics(torch.randn(64, 16, 16), torch.rand(64, 16, 16) + 0.1)
    autoencoder.save(folder)
    denoiser.save(folder)
    return str(folder)


@pytest.fixture
def pipeline(encoder: None, tmp_path: Path) -> Path:
    convert(write(tmp_path / "ours", random_denoiser()), tmp_path / "theirs", "diffusers")
    return tmp_path / "theirs"


@pytest.mark.usefixtures("encoder")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "adaln_shift": False, "positions": "learned", "class_names": (), "shift": 3.0},
        {"norm": "layer", "mlp": "gelu", "qk_norm": True, "positions": "none", "patch_size": 2, "allow_narrow": True},
    ],
)
def test_a_round_trip_changes_no_bit(tmp_path: Path, changes: dict[str, Any]):
    ours = random_denoiser(**changes)
    convert(write(tmp_path / "ours", ours), tmp_path / "theirs", "diffusers")
    convert(str(tmp_path / "theirs"), tmp_path / "back")
    back = Denoiser.load(str(tmp_path / "back"))
    assert back.config == ours.config
    state = back.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    assert torch.equal(back(X, T, Y), ours(X, T, Y))


def forward(state: dict[str, Tensor]) -> Tensor:
    """Compute the output of a RAEDiT2DModel from the names in its file."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].mT + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return state[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotated(x: Tensor, rope: str) -> Tensor:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * state[f"{rope}.freqs_cos"] + turned * state[f"{rope}.freqs_sin"]

    def block(name: str, x: Tensor, c: Tensor, heads: int, rope: str) -> Tensor:
        a = linear(f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6, -1)
        y = norm(f"{name}.norm1", x) * (1 + a[1]) + a[0]
        q, k, v = (linear(f"{name}.attn.to_{p}", y).unflatten(-1, (heads, -1)).transpose(1, 2) for p in "qkv")
        y = F.scaled_dot_product_attention(rotated(q, rope), rotated(k, rope), v).transpose(1, 2).flatten(2)
        x = x + a[2] * linear(f"{name}.attn.to_out.0", y)
        value, gate = linear(f"{name}.mlp.net.0.proj", norm(f"{name}.norm2", x) * (1 + a[4]) + a[3]).chunk(2, -1)
        return x + a[5] * linear(f"{name}.mlp.net.2", value * F.silu(gate))

    def embedded(name: str) -> Tensor:
        return F.conv2d(X, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"]).flatten(2).mT

    angles = 2 * torch.pi * T[:, None] * state["t_embedder.W"]
    time = linear("t_embedder.mlp.0", torch.cat([angles.sin(), angles.cos()], -1))
    time = linear("t_embedder.mlp.2", F.silu(time))[:, None]
    c = F.silu(time + state["y_embedder.embedding_table.weight"][Y][:, None])
    s = embedded("s_embedder") + state["pos_embed"]
    for i in range(2):
        s = block(f"blocks.{i}", s, c, 2, "enc_feat_rope")
    c = linear("s_projector", F.silu(s + time))
    x = block("blocks.2", embedded("x_embedder"), c, 4, "dec_feat_rope")
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, -1)
    x = linear("final_layer.linear", norm("final_layer.norm_final", x) * (1 + scale) + shift)
    return x.mT.unflatten(2, (16, 16))


@torch.no_grad()
def test_the_forward_pass_follows_the_names_of_the_file(pipeline: Path):
    ours = load(str(pipeline)).denoiser
    expected = forward(load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert (ours(X, T, Y) - expected).norm() < 1e-5 * expected.norm()
    assert ours.config.class_names == NAMES


def test_the_files_say_what_they_hold(pipeline: Path):
    index = json.loads((pipeline / "model_index.json").read_text())
    assert (index["_class_name"], index["id2label"]["3"]) == ("RAEDiTPipeline", NAMES[3])
    assert index["transformer"] == ["diffusers", "RAEDiT2DModel"]
    transformer = json.loads((pipeline / "transformer" / "config.json").read_text())
    assert (transformer["sample_size"], transformer["hidden_size"], transformer["depth"]) == (16, [48, 64], [2, 1])
    assert json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text())["shift"] == 2.0
    assert json.loads((pipeline / "vae" / "config.json").read_text())["_class_name"] == "AutoencoderRAE"


def test_diffusers_reads_the_autoencoder_and_the_scheduler(pipeline: Path):
    from diffusers import AutoencoderRAE, FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage]

    theirs: Any = AutoencoderRAE.from_pretrained(pipeline / "vae")
    ours, images = load(str(pipeline)).autoencoder, torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(ours.encode(images), theirs.encode(images).latent, rtol=1e-4, atol=1e-4)
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline / "scheduler")
    assert scheduler.config.shift == 2.0


@pytest.mark.parametrize(("steps", "alpha"), [(50, 48**0.5), (1, 2.0), (7, 0.5)])
def test_the_grid_of_diffusers(steps: int, alpha: float):
    from diffusers import FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage]

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=alpha)
    scheduler.set_timesteps(steps)
    times = time_grid(steps, alpha, "diffusers")
    assert times == pytest.approx(scheduler.sigmas.tolist(), abs=1e-5)
    if steps == 50:
        assert times[-2] == pytest.approx(0.0458, abs=1e-4)


def test_a_folder_is_converted_once(pipeline: Path, tmp_path: Path):
    load(str(pipeline))
    (made,) = (tmp_path / "cache").glob("diffusers-*/denoiser/model.safetensors")
    before = made.stat().st_mtime_ns
    load(str(pipeline))
    assert made.stat().st_mtime_ns == before
    edit("scheduler/scheduler_config.json", shift=3.25)(pipeline)
    assert load(str(pipeline)).denoiser.config.shift == 3.25


def edit(file: str, **fields: Any) -> Any:
    def change(folder: Path) -> None:
        values = json.loads((folder / file).read_text()) | fields
        (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))

    return change


def without(key: str) -> Any:
    def change(folder: Path) -> None:
        path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file({name: value for name, value in load_file(path).items() if name != key}, path)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            edit("model_index.json", _class_name="OtherPipeline"),
            "model_index.json: holds OtherPipeline; only diffusers'",
        ),
        (edit("model_index.json", transformer=["pipeline", "Mine"]), r"transformer is \['pipeline', 'Mine'\]; only"),
        (
            edit("model_index.json", id2label={"0": "a"}),
            "id2label: must be null or have a name for each of the 4 classes",
        ),
        (edit("transformer/config.json", hidden_size=48, depth=2, num_heads=2), "give two numbers"),
        (edit("transformer/config.json", more=1), "config.json: .*more"),
        (edit("transformer/config.json", sample_size="gone"), "config.json: .*input_size"),
        (edit("scheduler/scheduler_config.json", shift=0), "shift: 0.* must be positive"),
        (edit("scheduler/scheduler_config.json", use_karras_sigmas=True), "use_karras_sigmas"),
        (edit("vae/config.json", _class_name="AutoencoderKL"), "holds AutoencoderKL; only diffusers' AutoencoderRAE"),
        (without("blocks.0.attn.to_k.weight"), r"does not fit .*blocks\.0\.attention\.qkv\.weight"),
        (without("s_projector.bias"), "does not fit .*head_condition.bias"),
        (lambda folder: (folder / "transformer" / "config.json").unlink(), "transformer/config.json"),
    ],
)
def test_a_damaged_pipeline_is_one_error(pipeline: Path, change: Any, message: str):
    change(pipeline)
    with pytest.raises(UserError, match=message) as error:
        read(str(pipeline))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("encoder")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": None, "backbone": TransformerConfig(width=64, depth=1, heads=4)}, "cannot hold a DiT without a head"),
        ({"prediction": "data"}, "cannot hold a denoiser of RAE v2"),
        ({"num_classes": 0, "class_names": ()}, "cannot hold a denoiser without classes"),
    ],
)
def test_what_a_pipeline_cannot_hold_is_rejected(tmp_path: Path, changes: dict[str, Any], message: str):
    source = write(tmp_path / "ours", random_denoiser(**changes))
    with pytest.raises(UserError, match=f"diffusers: RAEDiT2DModel {message}.*only the autoencoder"):
        convert(source, tmp_path / "theirs", "diffusers")
    assert not (tmp_path / "theirs").exists()
    convert(f"{source}/autoencoder", tmp_path / "vae", "diffusers")
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").is_file()
