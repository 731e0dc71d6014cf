"""Is everything right on the device? Its results against the CPU's in float32, and steps that must not wait for it.

All models are the built-in ones, trained and small, unless a check needs a part that they lack.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpu.setting import Checks, Setting
from harness import denoiser
from raekit import randomness
from raekit.data.loader import DataConfig, Loader
from raekit.distributed import CPU, World
from raekit.evaluation.features import load_networks
from raekit.evaluation.references import measure_reference
from raekit.flow.guidance import Guidance
from raekit.flow.sampling import Sampling, denoise, sample_latents, sample_noise
from raekit.formats.conversion import FileOptions, convert, read
from raekit.inference.cache import Storage, cache_latents
from raekit.inference.cached_loader import LatentLoader
from raekit.models.autoencoder import Autoencoder, load_autoencoder
from raekit.models.denoiser import Denoiser
from raekit.models.encoders import load_encoder
from raekit.models.inception import Inception
from raekit.models.perceptual import LPIPS
from raekit.models.registry import LayersConfig
from raekit.progress import silent
from raekit.recipes import emoji_decoder_gan, emoji_dit_dh, emoji_encoder
from raekit.stages.decoder_losses import PerceptualConfig
from raekit.stages.run import StageConfig, build
from raekit.training.precision import float32_precision
from raekit.training.trainer import Report, TrainConfig, Trainer

TOLERANCES = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2}
"""The largest relative differences allowed of losses after a few steps."""
SAMPLED = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 1e-1}
"""The same of sampled latents. A bf16 sample may come out as a slightly different picture."""
EXACT = 1e-4
"""The same of one pass through a network in float32, and of statistics in float64."""


def stage(name: str, setting: Setting, precision: str = "fp32", compile: bool = False, steps: int = 0) -> StageConfig:
    """Return the config of a short training of a stage, with all of its losses from the first step on."""
    config: Any
    match name:
        case "encoder":
            config = emoji_encoder.config()
        case "decoder":
            weights = setting.scratch / "vgg.safetensors"
            if not weights.is_file():
                torch.manual_seed(0)
                save_file({key: 0.02 * torch.rand_like(value) for key, value in LPIPS().state_dict().items()}, weights)
            base = emoji_decoder_gan.config()
            assert base.adversarial
            config = replace(
                base,
                perceptual=PerceptualConfig(weights=str(weights)),
                adversarial=replace(base.adversarial, discriminator_start=0, start=0),
            )
        case _:
            config = emoji_dit_dh.config()
    size = setting.pick(2, 32)
    settings: dict[str, Any] = {"precision": precision, "compile": compile, "steps": steps or setting.pick(2, 6)}
    data = replace(config.data, split="heldout")  # stage 1 measures the statistics of all of its images
    train = TrainConfig(batch_size=size, micro_batch=size // 2, log_every=1, **settings)
    return replace(config, data=data, train=train)


@contextmanager
def drawn_on_the_cpu() -> Iterator[None]:
    """Draw all random numbers on the CPU and copy them, since each device has a generator of its own."""

    def on_the_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(seed: int, stream: str, positions: Any, shape: Any = (), device: Any = CPU) -> Tensor:
            return draw(seed, stream, positions, shape).to(device)

        return drawn

    with ExitStack() as stack:
        for name in ("normal", "uniform"):
            stack.enter_context(patch.object(randomness, name, on_the_cpu(getattr(randomness, name))))
        yield


def fit(
    config: StageConfig,
    setting: Setting,
    device: torch.device,
    report: Report,
    watched: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> None:
    """Train a stage without its evaluations; `watched` is given the stream of batches, and gives the same."""
    with tempfile.TemporaryDirectory(dir=setting.scratch) as folder:
        run, world = Path(folder), World(device=device)
        built = build(config, run, world)
        trainer = Trainer(run, config.train, built.objectives, lambda start: watched(built.batches(start)), world)
        built.prepare(silent)
        trainer.fit(report)


def training(setting: Setting, name: str) -> bool:
    """Losses of a stage in every precision, eager and compiled, against the CPU's"""

    def losses(config: StageConfig, device: torch.device) -> Tensor:
        found: list[list[float]] = []

        def note(_: int, values: dict[str, float]) -> None:
            found.append([value for name, value in sorted(values.items()) if name.endswith("loss")])

        with drawn_on_the_cpu():
            fit(config, setting, device, note)
        return torch.tensor(found)

    checks = Checks(f"training of the {name}", setting)
    expected = losses(stage(name, setting), CPU)
    for mode in setting.modes:
        for precision in setting.precisions:
            made = losses(stage(name, setting, precision, mode == "compiled"), setting.device)
            checks.compare(f"{name}, {precision}, {mode}: losses", made, expected, TOLERANCES[precision])
    return checks.publish()


def weaker(model: Denoiser) -> Denoiser:
    """Return a model for AutoGuidance: a copy whose weights are smaller."""
    weak = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(0.98)
    return weak


def samplings(steps: int, weak: Denoiser) -> dict[str, Sampling]:
    """Return every solver, and every guidance that the built-in denoiser has, by name."""
    cfg = Guidance(scale=2.0)
    return {
        "euler": Sampling(steps=steps),
        "heun": Sampling(steps=steps, solver="heun"),
        "ab2": Sampling(steps=steps, solver="ab2"),
        "abm": Sampling(steps=steps, solver="abm"),
        "dopri5": Sampling(solver="dopri5", rtol=1e-4),
        "euler-maruyama": Sampling(steps=steps, solver="euler-maruyama"),
        "published grid": Sampling(steps=steps, grid="published"),
        "backbone every second step": Sampling(steps=steps, reuse=2),
        "CFG": Sampling(steps=steps, guidance=(cfg,)),
        "CFG in an interval": Sampling(steps=steps, guidance=(replace(cfg, start=0.1, end=0.9),)),
        "AutoGuidance": Sampling(steps=steps, guidance=(Guidance(method="auto", scale=1.5),), weak=weak),
    }


def internal(steps: int) -> Sampling:
    return Sampling(steps=steps, guidance=(Guidance(method="internal", scale=1.5),))


def sampling(setting: Setting) -> bool:
    """Latents by every solver and guidance in every precision, eager and compiled, against the CPU's"""
    count, steps = setting.pick((2, 2), (8, 20))

    def cases(device: torch.device, precision: str, mode: str) -> dict[str, tuple[Denoiser, Sampling]]:
        model = Denoiser.load("builtin:emoji")
        weak, based = weaker(model), denoiser("tiny", CPU, base_depth=1, classes=10).eval()
        for each in (model, weak, based):
            each.set_dtype(torch.bfloat16 if precision == "bf16" else torch.float32).to(device)
            if mode == "compiled":
                each.compile(dynamic=False)
        found = {name: (model, how) for name, how in samplings(steps, weak).items()}
        return found | {"internal guidance": (based, internal(steps))}

    def latents(model: Denoiser, how: Sampling, device: torch.device) -> Tensor:
        with drawn_on_the_cpu():  # the noise between the steps of euler-maruyama
            return sample_latents(model, torch.arange(count, device=device), torch.arange(count), 0, how, device)

    checks = Checks("sampling", setting)
    expected = {name: latents(*case, CPU) for name, case in cases(CPU, "fp32", "eager").items()}
    for mode in setting.modes:
        for precision in setting.precisions:
            with float32_precision("tf32" if precision == "tf32" else "fp32"):
                torch.compiler.reset()  # of the networks of the last precision, torch keeps up to eight
                for name, case in cases(setting.device, precision, mode).items():
                    what = f"{name}, {precision}, {mode}: latents"
                    checks.compare(what, latents(*case, setting.device), expected[name], SAMPLED[precision])
    return checks.publish()


def use(setting: Setting) -> bool:
    """Encoding, decoding, latents cache, evaluation and conversion against the CPU's"""
    checks, device = Checks("use", setting), setting.device
    data = DataConfig(source="emoji", split="heldout", image_size=64)
    batch = next(Loader(data, seed=0).once(setting.pick(8, 64), World()))
    for name, dtype, allowed in (("fp32", torch.float32, EXACT), ("bf16", torch.bfloat16, TOLERANCES["bf16"])):
        here, there = load_autoencoder("builtin:emoji"), load_autoencoder("builtin:emoji", dtype).to(device)
        latents = here.encode(batch.pixels())
        with torch.no_grad():
            checks.compare(f"encode, {name}", there.encode(batch.to(device).pixels()), latents, allowed)
            checks.compare(f"decode, {name}", there.decode(latents.to(device)), here.decode(latents), allowed)
    autoencoder = load_autoencoder("builtin:emoji")
    stored: dict[Storage, float] = {"fp32": EXACT, "bf16": 1e-2, "int8": 2e-2}
    for storage, allowed in stored.items():
        read_back = [cached(autoencoder.to(place), data, storage, setting) for place in (CPU, device)]
        checks.compare(f"latents cache, {storage}", read_back[1], read_back[0], allowed)
    if not setting.tiny:
        references = [
            measure_reference(data, load_networks("builtin:vit-tiny", place), World(device=place))
            for place in (CPU, device)
        ]
        for name, expected in references[0].gaussians.items():
            made = references[1].gaussians[name]
            checks.compare(f"evaluation: mean in {name}", made.mean, expected.mean, EXACT)
            checks.compare(f"evaluation: covariance in {name}", made.covariance, expected.covariance, EXACT)
    torch.manual_seed(0)
    network = Inception()
    images = batch.pixels()[:2]
    expected = network(images)
    checks.compare("evaluation: Inception's features", network.to(device)(images.to(device)), expected, EXACT)
    # RAE v1 knows only latents of the last block.
    builtin = Autoencoder.load("builtin:emoji")
    original = Autoencoder(replace(builtin.config, layers=LayersConfig()), load_encoder("builtin:vit-tiny"))
    original.decoder.load_state_dict(builtin.decoder.state_dict())
    original.set_statistics(builtin.mean, builtin.var)
    original.save(setting.scratch / "last block")
    written = setting.scratch / "v1"
    convert(str(setting.scratch / "last block"), written, "v1")
    options = FileOptions(
        encoder="builtin:vit-tiny", statistics=written / "stat.pt", decoder_config=written / "config.json"
    )
    converted = read(str(written / "model.pt"), options, denoiser=False).autoencoder
    assert converted
    model = converted.build().to(device)
    latents = original.encode(batch.pixels())
    with torch.no_grad():
        made, expected = model.decode(latents.to(device)), original.decode(latents)
    checks.compare("conversion to v1 and back: decode", made, expected, EXACT)
    reference_cases(checks)
    return checks.publish()


def cached(autoencoder: Any, data: DataConfig, storage: Storage, setting: Setting) -> Tensor:
    """Return a batch of latents that a cache was made of and gives back."""
    world = World(device=autoencoder.var.device)
    with tempfile.TemporaryDirectory(dir=setting.scratch) as folder:
        place = Path(folder, "cache")
        cache_latents(autoencoder, "builtin:emoji", data, place, dtype=storage, world=world)
        return next(LatentLoader(place, data, 0, autoencoder).stream(0, 16, World())).latents.clone()


def reference_cases(checks: Checks) -> None:
    """Add the reference cases of the published implementations, if they are at hand: RAEKIT_SHARED names the folder."""
    from tests import reference

    root = Path(os.environ.get("RAEKIT_SHARED", Path(__file__).parents[2] / "shared"))
    paths = sorted((root / "golden").glob("*.npz"))
    if not paths:
        checks.add("reference cases", "none found", "RAEKIT_SHARED", True)
    # The tolerances are for float32, and torch uses TF32 in convolutions by default.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.device(checks.setting.device):
        for path in paths:
            for status, output, detail in reference.check(path):
                if status != "note":
                    checks.add(f"reference case {path.stem}: {output}", detail, "its own", status == "ok")


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Make an operation that waits for the device an error; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(setting: Setting) -> bool:
    """Steps of every stage and of the samplers, with every wait for the device an error"""
    checks, device = Checks("steps that wait for the device", setting), setting.device
    for name in ("encoder", "decoder", "denoiser"):
        checks.add(f"training, {name}", *without_waiting(partial(train_without_waiting, name, setting)))
    model = Denoiser.load("builtin:emoji").to(device)
    based = denoiser("tiny", device, base_depth=1, classes=10).eval()
    labels = torch.arange(4, device=device)
    cases = {name: (model, how) for name, how in samplings(4, weaker(model)).items()}
    for name, (network, how) in (cases | {"internal guidance": (based, internal(4))}).items():
        if how.solver in ("dopri5", "euler-maruyama"):
            continue  # the one chooses its steps by what it finds, the other draws noise on the CPU
        noise = sample_noise(network, 0, "sample", range(4)).to(device)

        def run(network: Denoiser = network, how: Sampling = how, noise: Tensor = noise) -> None:
            denoise(network, lambda stream: noise, labels, how)  # once before, for what is made on first use
            with no_waiting(device):
                denoise(network, lambda stream: noise, labels, how)

        checks.add(f"sampling, {name}", *without_waiting(run))
    return checks.publish()


def without_waiting(run: Callable[[], object]) -> tuple[str, str, bool]:
    """Return the cells of a row: whether `run` met an operation that waits."""
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0], "no wait", False
    return "no wait" if torch.cuda.is_available() else "ran, on a CPU", "no wait", True


def train_without_waiting(name: str, setting: Setting) -> None:
    """Train for some steps, of which all but the first two and the last must not wait."""
    steps = setting.pick(4, 8)
    config = stage(name, setting, steps=steps)
    config = replace(config, train=replace(config.train, log_every=100))

    def watched(stream: Iterator[Any]) -> Iterator[Any]:
        yield from islice(stream, 2)
        with no_waiting(setting.device):
            yield from islice(stream, steps - 3)
        yield from stream

    fit(config, setting, setting.device, lambda step, values: None, watched)
