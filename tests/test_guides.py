"""The commands of the guides, run at small sizes, and the options that the documentation names."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from raekit import cli, recipes
from raekit.cli.completion import _words
from raekit.config import to_dict
from raekit.models.registry import FAMILIES, REGISTRY

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"

RECIPE = """
from dataclasses import replace

from raekit.models.denoiser_config import TransformerConfig
from raekit.models.registry import LayersConfig
from raekit.recipes import find

def config():
    config = find("{name}").config
    part = TransformerConfig(width=16, depth=1, heads=2)
    return replace(
        config,
        {model},
        data=replace(config.data, image_size=16, workers=0),
        train=replace(
            config.train, steps=2, batch_size=4, checkpoint_every=2, micro_batch=None, precision="fp32", compile=False
        ),
        optim=replace(config.optim, warmup_steps=1, decay_end=2),
    )
"""
DENOISER = "autoencoder={model!r}, shift_base=256, denoiser=replace(config.denoiser, backbone=part, head=part)"
DECODER = (
    "encoder={model!r}, encoder_size=None, "
    "decoder=replace(config.decoder, width=16, depth=1, heads=2, hidden=32, patch_size=4)"
)
SMALL = {"photos_256": DENOISER, "dit_dh_xl_dinov2b_256": DENOISER, "dinov2b_decoder_xl": DECODER}
SMALL |= {"emoji_decoder": f"{DECODER}, layers=LayersConfig()", "emoji_classifier": "widths=(8, 16)"}
SMALL |= {"emoji_dit_dh": DENOISER[:-1] + ", base_depth=0, qk_norm=False, prediction='velocity')"}
"""The recipes of the guides, and how each is made small."""


def commands(guide: str) -> list[list[str]]:
    """Return the commands in a guide: the lines of bash blocks, and the code in tables, that call raekit."""
    text = (GUIDES / guide).read_text("utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += [code for row in text.splitlines() if row.startswith("|") for code in re.findall(r"`([^`]+)`", row)]
    found = []
    for words in (shlex.split(line, comments=True) for line in lines):
        if "raekit" in words and "--" in words:  # torchrun ... -m raekit -- COMMAND
            found.append(words[words.index("--") + 1 :])
        elif words[:1] == ["raekit"] or words[:2] == ["srun", "raekit"]:
            found.append(words[words.index("raekit") + 1 :])
    return found


def smaller(command: list[str], model: str, weaker: str, vgg: str) -> list[str]:
    """Return a command for a small model, few images and one process."""
    names = {name: f"{name}.py" for name in SMALL} | dict.fromkeys(("rae-dinov2-b", "dinov2-b", "builtin:emoji"), model)
    names |= {"cfg:3+internal:1.5": "cfg:3"}  # the small model has no base output
    names |= {"REFERENCE": "imagenet256.safetensors", "inception": "builtin:vit-tiny"}
    values = {
        "--image-size": "16",
        "--count": "40",
        "--workers": "0",
        "--epochs": "1",
        "--train.batch-size": "4",
        "--denoiser.backbone.width": "16",
        "--denoiser.backbone.depth": "1",
        "--denoiser.backbone.heads": "2",
    }
    small: list[str] = []
    for option, word in zip(["", *command], command, strict=False):
        if word in ("--gpus", "--train.shard") or option in ("--gpus", "--train.shard"):
            continue
        if word.startswith("dit-dh-"):
            word = weaker if option == "--weak" else model
        word = names.get(word, word)
        small.append(values.get(option, word))
    if command[0] == "evaluate" and "--reconstruct" not in command:
        small += ["--steps", "3"] if "--count" in command else ["--steps", "3", "--count", "40"]
    if command[:2] == ["train", "dinov2b_decoder_xl"]:
        small += ["--perceptual.weights", vgg]
    if command[:2] == ["train", "photos_256"] and "--init-from" not in command:
        small += ["--init-from", model]
    return small


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub
@pytest.mark.parametrize("guide", ["own-images.md", "small-images.md", "cluster.md", "reproduce.md"])
def test_every_command_of_a_guide_runs(monkeypatch, tmp_path, images, tiny_model, weaker, vgg, hub, capsys, guide):
    monkeypatch.chdir(tmp_path)
    source = Path(images.partition(":")[2])
    for copy in range(3):  # enough to hold some out
        for path in source.glob("train/*/*.png"):
            target = Path("photos", path.parent.name, f"{copy}-{path.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copytree("photos", "pictures")
    shutil.copytree(source, "imagenet")
    for name, model in SMALL.items():
        Path(f"{name}.py").write_text(RECIPE.format(name=name, model=model.format(model=str(tiny_model))))
    given = commands(guide)
    if guide == "reproduce.md":  # its reference is a file from elsewhere
        given = [command for command in commands("cluster.md") if command[0] == "reference"] + given
    assert len(given) >= 6
    for command in given:
        monkeypatch.setattr(sys, "argv", ["raekit", *smaller(command, str(tiny_model), str(weaker), vgg)])
        try:
            cli.main()
        except SystemExit as exit:
            pytest.fail(f"raekit {' '.join(command)}\nexit {exit.code}: {capsys.readouterr().err}")
    if guide == "own-images.md":
        assert "README.md" in hub.repositories["OWNER/NAME"]
        assert Path("published.png").is_file()


def test_the_code_of_ones_own_loop_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(FAMILIES, "mine", raising=False)  # afterwards too
    monkeypatch.delitem(REGISTRY, "my-encoder", raising=False)
    text = (GUIDES / "own-loop.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("STEPS = 1000", "STEPS = 2"), names)
    assert names["step"] == 2


def test_the_notebook_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((GUIDES / "quickstart.ipynb").read_text("utf-8"))["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert "tuned" in names
    assert "report" in names


def fields(config: object) -> set[str]:
    """Return the dotted names of a config's fields, also of its optional parts, and the names that turn flags off."""
    found = set()
    for path, value in _leaves(to_dict(config)):
        found |= {path, *(path.rsplit(".", i)[0] for i in range(1, path.count(".") + 1))}
        if isinstance(value, bool):
            part, dot, name = path.rpartition(".")
            found.add(f"{part}{dot}no-{name}")
        assert value is None or path
    return found


def _leaves(values: dict, path: str = ""):
    for key, value in values.items():
        name = f"{path}{key}".replace("_", "-")
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        yield name, value


OPTIONAL = ("evaluation.", "selection.", "samples.")
"""Parts that a recipe may lack, so that their fields are not in any recipe's config."""
ELSEWHERE = re.compile(
    r"--(nnodes|nproc-per-node|rdzv-\w+|signals-to-handle|ntasks-per-node|gpus-per-node|gpus-per-task|gpu-bind|cpus-per-task|nodes|time|signal|"
    r"requeue|open-mode|repo-type|tiny|batch|precisions|decoder|size|version|pictures?|repeats|index|out|"
    r"solvers|grids|evaluations|judge|modes)$"
)
"""Options of torchrun, SLURM, hf and the benchmarks."""


def test_the_documentation_names_only_options_that_exist():
    known = {word for words in _words(cli.COMMANDS).values() for word in words}
    for name in recipes.names():
        known |= {f"--{field}" for field in fields(recipes.find(name).config)}
    wrong = {}
    for page in (*ROOT.glob("docs/**/*.md"), ROOT / "README.md"):
        text = page.read_text("utf-8")
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text):
            if option not in known and not ELSEWHERE.match(option) and not option[2:].startswith(OPTIONAL):
                wrong[option] = page.name
    assert not wrong


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = {
        str(page.relative_to(ROOT / "docs")) for kind in ("md", "ipynb") for page in ROOT.glob(f"docs/**/*.{kind}")
    }
    assert {page for page in pages if f": {page}\n" not in navigation} == set()
