"""The cost and result of imports. Import-linter checks the layers."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import raekit

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(raekit.__path__, "raekit.") if "assets" not in module.name
)


def loaded_after(statement: str) -> set[str]:
    """Return the modules that a new process has loaded after `statement`."""
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_every_public_name_is_there():
    assert set(raekit.__all__) == {name for name in raekit.__all__ if hasattr(raekit, name)}
    assert {"Autoencoder", "Denoiser", "load", "reconstruct", "generate", "evaluate"} <= set(raekit.__all__)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "raekit.__main__"])
def test_every_module_imports_and_has_a_docstring(name):
    if name == "raekit.cli.browser":
        pytest.importorskip("gradio")
    module = __import__(name, fromlist=["_"])
    empty = hasattr(module, "__path__") and name not in ("raekit.recipes", "raekit.data.sources")
    assert empty or (module.__doc__ or "").strip()


def test_the_library_starts_without_optional_modules():
    loaded = loaded_after("import raekit, raekit.stages.run, raekit.training.trainer")
    assert not loaded & {"transformers", "matplotlib", "datasets", "tensorboard", "torch.utils.tensorboard"}


def test_help_and_version_need_no_torch():
    loaded = loaded_after("import raekit, raekit.cli")
    assert not loaded & {"torch", "numpy", "PIL", "pydantic"}


def test_generating_does_not_import_torch_s_compiler():
    statement = "import raekit\nraekit.Pipeline.from_pretrained('builtin:emoji')('flags', steps=1)"
    assert not loaded_after(statement) & {"torch._dynamo", "torch.distributed.fsdp", "sympy"}


def test_public_names_come_from_their_modules():
    from raekit.evaluation.evaluate import evaluate
    from raekit.models.autoencoder import Autoencoder

    assert raekit.Autoencoder is Autoencoder
    assert raekit.evaluate is evaluate
    assert set(dir(raekit)) >= {*raekit.__all__}
    with pytest.raises(AttributeError, match="module 'raekit' has no attribute 'autoencoder'"):
        raekit.autoencoder  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_published_names_are_known_as_soon_as_the_package_is_imported():
    import raekit.hub

    assert raekit.hub.published is not None
    assert {"rae-dinov2-b", "dit-dh-xl-256"} <= {*raekit.hub.published().NAMES}


def test_the_package_itself_imports_in_milliseconds():
    slow = {
        "torch",
        "numpy",
        "huggingface_hub",
        "safetensors",
        "pydantic",
        "tyro",
        "urllib.request",
        "socket",
        "asyncio",
    }
    assert not loaded_after("import raekit") & slow


@pytest.mark.parametrize("kind", [str, Path])
def test_public_functions_take_paths_and_strings(kind, images, tiny_model, tmp_path):
    place = kind(tiny_model)
    model = raekit.load(place)
    for part in raekit.Autoencoder.load(place), raekit.Denoiser.load(place), raekit.Pipeline.from_pretrained(place):
        (part.save_pretrained if isinstance(part, raekit.Pipeline) else part.save)(kind(tmp_path / "copy"))
    raekit.convert(kind(tmp_path / "copy"), kind(tmp_path / "converted"))
    assert raekit.load(kind(tmp_path / "converted")).denoiser.config == model.denoiser.config
    report, _ = raekit.evaluate(
        place, source=images, features=[str(tiny_model)], count=3, sampling=raekit.Sampling(steps=1), out=kind(tmp_path)
    )
    assert report.names["model"] == str(tiny_model)
