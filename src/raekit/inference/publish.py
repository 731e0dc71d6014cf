"""Publish a model on the Hub: its files, and a model card that says what the model is."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from raekit.config import read_json, to_json
from raekit.errors import UserError, check_text
from raekit.hub import ASSETS, is_repository
from raekit.inference.catalogue import BUILT_IN_LICENCE
from raekit.inference.pipeline import Pipeline
from raekit.models.registry import REGISTRY
from raekit.models.vit import ViT

GRID = "samples.png"


@dataclass(frozen=True)
class Score:
    """A score for the model card.

    Attributes:
        metric: the name of the metric.
        value: its value.
        dataset: the real images that were compared with.
    """

    metric: str
    value: float
    dataset: str


@contextmanager
def prepared(
    pipeline: Pipeline,
    repository: str,
    *,
    run: Path | None = None,
    scores: Sequence[Score] = (),
    dtype: torch.dtype | None = None,
) -> Iterator[Path]:
    """Yield a temporary folder with the files to publish: the model, README.md and a grid of samples.

    The files contain no local path: the address of the dataset and the folder of the encoder are left out.

    Args:
        pipeline: the model.
        repository: OWNER/NAME on the Hub.
        run: the run that trained the model, for the facts of its config.
        scores: the scores for the model card.
        dtype: the type to store the weights in. Default: the type that they have.

    Raises:
        UserError: `repository` is not of the form OWNER/NAME, or the model names a VAE in a local folder.
    """
    check_name(repository)
    where = getattr(pipeline.autoencoder.config, "baseline", "").removeprefix("vae:")
    if where and Path(where).is_dir():
        raise UserError(
            f"{where}: a published model names its VAE, and this VAE is in a local folder; upload the VAE (`hf upload "
            f"OWNER/VAE {where}`), and train or save the model with vae:OWNER/VAE"
        )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            pipeline.save_pretrained(folder, dtype=dtype)
        except UserError as error:
            if place not in str(error):
                raise
            raise UserError(f"{error}; set TMPDIR to another folder") from None
        for path in folder.glob("*/config.json"):
            path.write_text(to_json(_without_paths(read_json(path))), "utf-8")
        if pipeline.denoiser:
            pipeline(count=16).save(folder / GRID)
        model_card(pipeline, repository, run=run, scores=scores).save(folder / "README.md")
        yield folder


def check_name(repository: str) -> None:
    """Raise UserError unless `repository` has the form OWNER/NAME."""
    check_text("repository", repository)
    if not is_repository(repository) or "@" in repository:
        raise UserError(f"{repository}: not the name of a repository; give OWNER/NAME")


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder that `prepared` made to the Hub, and return its address.

    Args:
        folder: the folder.
        repository: OWNER/NAME. The repository is created if it does not exist.
        private: whether a new repository is private.

    Raises:
        UserError: the Hub does not accept the upload.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Publish a model made with raekit")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"{repository}: the Hub did not accept the model ({reason}); log in with `hf auth login`, as a user who "
            "may write there"
        ) from None
    return str(address)


def model_card(
    pipeline: Pipeline, repository: str, *, run: Path | None = None, scores: Sequence[Score] = ()
) -> ModelCard:
    """Return the model card of a model, see `prepared` for the arguments."""
    encoder, licence = _encoder(pipeline)
    open_licence = licence in ("apache-2.0", "mit")
    public = REGISTRY[encoder].hub_id if encoder in REGISTRY else None
    name = repository.partition("/")[2]
    data = ModelCardData(
        library_name="raekit",
        pipeline_tag="unconditional-image-generation" if pipeline.denoiser else "image-to-image",
        license=licence if open_licence else "other",
        license_name=None if open_licence else licence or None,
        base_model=public,
        tags=["representation-autoencoder", "diffusion"],
        model_name=name if scores else None,
        eval_results=[
            EvalResult(
                task_type="image-generation" if pipeline.denoiser else "image-reconstruction",
                dataset_type="images",
                dataset_name=score.dataset,
                metric_type=score.metric,
                metric_value=score.value,
            )
            for score in scores
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(ASSETS / "model-card.md"),
        name=name,
        repository=repository,
        generates=pipeline.denoiser is not None,
        pixels=" x ".join(map(str, pipeline.autoencoder.image_shape)),
        classes=pipeline.denoiser.config.class_names if pipeline.denoiser else (),
        grid=GRID if pipeline.denoiser else None,
        parts=_parts(pipeline, encoder),
        training=_training(run) if run else [],
        scores=scores,
        encoder=encoder,
        licence=licence,
    )


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Return the config of an artifact without local paths."""
    if "encoder" in values and Path(values["encoder"]).is_dir():
        values["encoder"] = "encoder"  # its weights are in encoder/, where loading looks first
    return {name: value for name, value in values.items() if name != "trained_on" or ":" not in value}


def _encoder(pipeline: Pipeline) -> tuple[str, str]:
    """Return the name and the licence of the encoder; "" if the licence is not known."""
    name = getattr(pipeline.autoencoder.config, "encoder", None) or pipeline.autoencoder.config.baseline
    if name in REGISTRY:
        return name, REGISTRY[name].licence
    if name.startswith("builtin:"):
        return name, BUILT_IN_LICENCE
    own = isinstance(getattr(pipeline.autoencoder.encoder, "model", None), ViT)
    return ("trained with raekit" if own else name), ""


def _parts(pipeline: Pipeline, encoder: str) -> list[tuple[str, str]]:
    """Return what the parts of the model are, as rows of a table."""
    shape = " x ".join(map(str, pipeline.autoencoder.latent_shape))
    rows = [("encoder", f"{encoder}, frozen; latents {shape}")]
    for name, part in (("decoder", pipeline.autoencoder.decoder), ("denoiser", pipeline.denoiser)):
        if part is not None:
            rows.append((name, f"{sum(p.numel() for p in part.parameters()):,} parameters"))
    return rows


def _training(run: Path) -> list[tuple[str, str]]:
    """Return the facts of a run, as rows of a table. Local paths are left out."""
    config, images = read_json(run / "config.json"), read_json(run / "inputs.json")["data"]["count"]
    train, optim = config["train"], config["optim"]
    return [
        ("stage", config["stage"]),
        ("data", f"{images:,} images at {config['data']['image_size']} pixels"),
        ("steps", f"{train['steps']:,} of {train['batch_size']} images"),
        ("optimizer", f"{optim['method']}, learning rate {optim['lr']:g} to {optim['final_lr']:g}"),
        ("weight averages", ", ".join(map(str, config["ema"]))),
    ]
