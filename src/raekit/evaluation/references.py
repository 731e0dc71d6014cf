"""References: statistics and features of real images, in raekit's own files and the files of other projects."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raekit.config import configclass, from_dict, to_dict
from raekit.data.archives import Npz
from raekit.data.loader import DataConfig, Loader
from raekit.data.sources import absolute, is_copy, listing
from raekit.data.sources.base import Split
from raekit.distributed import World
from raekit.errors import UserError, some
from raekit.evaluation.features import FeatureNetwork, Images, ReferenceNetwork, weights_of
from raekit.evaluation.frechet import Gaussian
from raekit.evaluation.manifold import Kept
from raekit.evaluation.streaming import BATCH, images_of, score_stream
from raekit.files import whole
from raekit.models.conditioning import same_classes
from raekit.moments import Moments
from raekit.progress import Progress, counted, silent
from raekit.weights import fingerprint, read_weights

MAX_WIDTH = 16_384
"""The largest number of features. A covariance of this width takes 2 GiB."""

_METADATA = "raekit reference"  # the key in the header of raekit's files
_SYMMETRY = 1e-5  # relative; the largest deviation that rounding to float32 can cause

# Everything that unpickling a numpy array needs, under the names of numpy 1 and 2. None of it runs other code.
_NUMPY = [
    (np.ndarray, "numpy.ndarray"),
    (np.dtype, "numpy.dtype"),
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]


@configclass
class About:
    """Where a reference comes from. The files of other projects leave most fields unknown (None).

    Attributes:
        source: address of the images, with an absolute path.
        split: split of the source.
        image_size: side in pixels that the images were centre-cropped to.
        count: number of images.
        names: digest of the names of the files (`listing`).
        sizes: digest of the sizes of the files.
        resize: {network: how it resized the images}.
        weights: {network: 16 hexadecimal digits that identify its weights}.
        classes: number of images of each class; None for images without classes.
        class_names: names of the classes; None if they are not known.
        hash: 16 hexadecimal digits that identify the numbers of the reference.
    """

    source: str | None = None
    split: Split | None = None
    image_size: int | None = None
    count: int | None = None
    names: str | None = None
    sizes: str | None = None
    resize: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    classes: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None
    hash: str = ""


@configclass
class _Header:
    """The header of raekit's files. `counts` has the number of images for each network."""

    about: About
    counts: dict[str, int | None]


@dataclass(frozen=True)
class Reference:
    """Statistics and features of real images, by network name.

    Attributes:
        place: name of the reference in messages.
        about: where the reference comes from.
        gaussians: mean and covariance of the features of all images.
        features: features (N, width) float32 of some images, for precision, recall and KID.
        images: address of the images if the file contains images, such as ADM's files. `data.sources` reads it.
        measured: whether this call measured it. Measured again, its last digits depend on the number of processes and
            threads, and so does its hash.
    """

    place: str
    about: About
    gaussians: Mapping[str, Gaussian]
    features: Mapping[str, Tensor] = field(default_factory=dict)
    images: str | None = None
    measured: bool = False

    def gaussian(self, network: FeatureNetwork) -> Gaussian:
        """Return the statistics in the features of `network`. UserError if the reference has none."""
        if network.name not in self.gaussians:
            raise UserError(
                f"{self.place}: has statistics of {', '.join(self.gaussians) or 'no network'}, and not of "
                f"{network.name}; make a reference with {network.name} (raekit reference)"
            )
        gaussian = self.gaussians[network.name]
        if gaussian.dim != network.width:
            raise UserError(
                f"{self.place}: the statistics of {network.name} have {gaussian.dim} dimensions, but the features of "
                f"this network have {network.width}; make a reference with this network (raekit reference)"
            )
        return gaussian

    def check_size(self, image_size: int) -> None:
        """Raise UserError if images of `image_size` cannot be compared with the reference."""
        if self.about.image_size not in (None, image_size):
            raise UserError(
                f"{self.place}: was measured on images of {self.about.image_size} pixels, and these images have "
                f"{image_size}; distances between resolutions mean nothing, so use a reference of {image_size} pixels"
            )

    def check_classes(self, names: Sequence[str]) -> None:
        """Raise UserError if labels in the proportions of the reference mean nothing for a model of classes `names`."""
        if not same_classes(names, self.about.class_names or ()):
            raise UserError(
                f"{self.place}: its classes ({some(self.about.class_names or ())}) are not the classes of the model "
                f"({some(names)}); use balanced labels, or a reference of the model's own classes"
            )

    def check_originals(self, source: str, split: Split, count: int) -> None:
        """Raise UserError unless the reference was measured on the images that are reconstructed or interpolated."""
        about, source = self.about, absolute(source)
        found = (about.source, about.split)
        if found == (None, None):
            found, reason = "images that it does not name", "a reference for generated images gives a different score"
        else:
            found, reason = f"{found[0]} ({found[1]})", "these images are compared with their own originals"
        remedy = f"run raekit reference {source} --split {split}"
        known = about.names, about.sizes
        copied = about.source is not None and is_copy(about.source, known, source)
        if about.split != split or not (copied or about.source == source):
            raise UserError(
                f"{self.place}: was measured on {found}, and the originals are {source} ({split}): {reason}; {remedy}"
            )
        if copied and about.count is not None and about.count < count:
            raise UserError(
                f"{self.place}: {count - about.count} of the {count} images of {source} ({split}) could not be read "
                f"when it was measured, and reconstructions need every image; repair or remove them, then {remedy}"
            )
        if about.count != count or (about.names and not copied):
            raise UserError(
                f"{self.place}: the files of {found} have changed since it was measured on {about.count} images, and "
                f"{count} are there now: {reason}; {remedy}"
            )

    def write(self, path: str | Path) -> None:
        """Write the reference as a .safetensors file. UserError if the file cannot be written."""
        header = _Header(about=self.about, counts={name: one.count for name, one in self.gaussians.items()})
        with whole(Path(path)) as partial:
            save_file(_tensors(self.gaussians, self.features), partial, {_METADATA: json.dumps(to_dict(header))})


def read_reference(path: str | Path, network: str | None = None) -> Reference:
    """Read a reference from a file of raekit or another project. Reading never runs code from the file.

    - `.safetensors`: a file of `raekit reference`, checked against its hash.
    - `.npz`: ADM's file (`mu`, `sigma`, sFID's `mu_s` and `sigma_s`, and images in `arr_0`), or only `mu` and
      `sigma`, as written by pytorch-fid and clean-fid.
    - `.pt`, `.pth`: `mu` and `sigma`, as cached by torch-fidelity.

    Args:
        path: the file.
        network: name of the network, for files that do not name it. Default: `clean_inception` if the file's name
            contains clean-fid's `_clean_`, otherwise `inception`.

    Raises:
        UserError: the file is missing or damaged, or its statistics are not finite, not symmetric or of a wrong shape.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_ours(path)
    name = network or ("clean_inception" if "_clean_" in path.name else "inception")
    if path.suffix == ".npz":
        return _read_npz(path, name)
    if path.suffix in (".pt", ".pth"):
        with torch.serialization.safe_globals(_NUMPY):
            values = read_weights(path)
        mean, covariance = (_array(values, key, path) for key in ("mu", "sigma"))
        return _reference(str(path), About(), {name: _gaussian(f"{path}: {name}", mean, covariance, None)})
    raise UserError(f"{path}: not a reference; give a .safetensors, .npz or .pt file (raekit reference makes one)")


def _read_npz(path: Path, name: str) -> Reference:
    npz = Npz(path)
    gaussians = {}
    for key, part in ("", name), ("_s", f"{name}_spatial"):
        mean, covariance = f"mu{key}", f"sigma{key}"
        if not {mean, covariance} & npz.arrays.keys() and key:
            continue
        for array in (mean, covariance):
            dtype, shape = npz.arrays.get(array, (None, ()))
            if dtype is None:
                hint = f"; measure its images: raekit reference npz:{path}" if "arr_0" in npz.arrays else ""
                raise UserError(f"{path}: not a reference: {array} is missing, it holds {', '.join(npz.arrays)}{hint}")
            if dtype.kind != "f" or not 1 <= len(shape) <= 2 or max(shape) > MAX_WIDTH:
                raise UserError(f"{path}: {array} is {dtype} {shape}; expected a mean (D,) or a covariance (D, D)")
        gaussians[part] = _gaussian(f"{path}: {part}", npz.read(mean), npz.read(covariance), None)
    dtype, shape = npz.arrays.get("arr_0", (None, ()))
    if dtype == np.uint8 and len(shape) == 4 and shape[1] == shape[2]:
        return _reference(str(path), About(image_size=shape[1]), gaussians, images=f"npz:{path}")
    return _reference(str(path), About(), gaussians)


def _read_ours(path: Path) -> Reference:
    tensors = read_weights(path)
    with safe_open(path, "pt") as file:
        metadata = (file.metadata() or {}).get(_METADATA)
    try:
        header = from_dict(_Header, json.loads(metadata or ""), path)
    except ValueError:
        raise UserError(
            f"{path}: not a reference: its header lacks {_METADATA!r}; make a reference with raekit reference"
        ) from None
    features = {key.removesuffix(".features"): value for key, value in tensors.items() if key.endswith(".features")}
    wanted = {f"{name}.{part}" for name in header.counts for part in ("mean", "covariance")}
    wanted |= {f"{name}.features" for name in features if name in header.counts}
    if wanted != tensors.keys() or not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise UserError(f"{path}: damaged: it holds {', '.join(sorted(tensors))}; make the reference again")
    gaussians = {}
    for name, count in header.counts.items():
        mean, covariance = (tensors[f"{name}.{part}"].double().numpy() for part in ("mean", "covariance"))
        gaussians[name] = _gaussian(f"{path}: {name}", mean, covariance, count)
    if any(values.ndim != 2 or values.shape[1] != gaussians[name].dim for name, values in features.items()):
        raise UserError(f"{path}: damaged: features and statistics have different dimensions; make the reference again")
    reference = _reference(str(path), header.about, gaussians, features)
    if reference.about.hash != header.about.hash:
        raise UserError(
            f"{path}: damaged: its numbers do not have the hash {header.about.hash}; make the reference again"
        )
    return reference


def _reference(
    place: str,
    about: About,
    gaussians: Mapping[str, Gaussian],
    features: Mapping[str, Tensor] | None = None,
    images: str | None = None,
) -> Reference:
    """Return a reference, with the hash of its numbers."""
    features = features or {}
    return Reference(
        place, replace(about, hash=fingerprint(_tensors(gaussians, features))), gaussians, features, images
    )


def _array(values: Mapping[str, object], key: str, path: Path) -> np.ndarray:
    value = values.get(key)
    if isinstance(value, Tensor):
        value = value.detach().numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise UserError(f"{path}: not a reference: {key} is missing, it holds {', '.join(values)}")
    return value


def _gaussian(what: str, mean: np.ndarray, covariance: np.ndarray, count: int | None) -> Gaussian:
    """Check statistics and return them. Error messages begin with `what`."""
    if mean.ndim != 1 or not 1 <= len(mean) <= MAX_WIDTH or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{what}: the mean has shape {mean.shape}, the covariance {covariance.shape}; expected (D,) and (D, D)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{what}: the statistics contain numbers that are not finite; make the reference again")
    covariance = covariance.astype(np.float64)
    largest = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > _SYMMETRY * largest:
        raise UserError(f"{what}: the covariance is not symmetric; make the reference again")
    if covariance.diagonal().min() < -_SYMMETRY * largest:
        raise UserError(f"{what}: the covariance has a negative variance; make the reference again")
    return Gaussian(torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance), count)


def _tensors(gaussians: Mapping[str, Gaussian], features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all numbers, under their names in raekit's files."""
    tensors = {f"{name}.mean": gaussian.mean for name, gaussian in gaussians.items()}
    tensors |= {f"{name}.covariance": gaussian.covariance for name, gaussian in gaussians.items()}
    tensors |= {f"{name}.features": values.float().cpu() for name, values in features.items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def _class_counts(loader: Loader) -> tuple[int, ...] | None:
    if not loader.classes:
        return None
    labels = loader.source.labels
    return tuple(np.bincount(labels[labels >= 0], minlength=len(loader.classes)).tolist())


class _Measured:
    """An accumulator that measures a reference in one network. It reports no metric.

    It keeps the moments of all images, and the features of about `keep` of `total` images, spread evenly.
    """

    def __init__(self, network: FeatureNetwork, keep: int, total: int):
        self.network, self.keep, self.total = network, keep, total
        self.moments = Moments(network.width)
        self.kept = Kept()
        self.features = torch.empty(0, network.width)

    def update(self, batch: Images) -> None:
        features = batch.features(self.network)
        self.moments.update(features)
        if self.keep:
            chosen = (batch.indices * self.keep) // self.total != ((batch.indices - 1) * self.keep) // self.total
            self.kept.update(features[chosen.to(features.device)], batch.indices[chosen])

    def reduce(self, world: World) -> None:
        self.moments.reduce(world)
        if self.keep:
            self.features = self.kept.gathered(world).cpu()

    def result(self) -> dict[str, float]:
        return {}


def reference_loader(data: DataConfig) -> Loader:
    """Return a loader of the images of a reference, in their order.

    Raises:
        UserError: there are fewer than two images, or an error in the data.
    """
    loader = Loader(data, seed=0)
    if len(loader) < 2:
        raise UserError(
            f"{data.source}: a Frechet distance needs at least two images, and the split {data.split!r} has "
            f"{len(loader)}; add images"
        )
    return loader


def measure_reference(
    data: DataConfig,
    networks: Mapping[str, ReferenceNetwork],
    world: World,
    *,
    keep: int = 10_000,
    progress: Progress = silent,
) -> Reference:
    """Measure a reference on all images of a source, in one pass. All processes call it and get the same reference.

    Args:
        data: the images.
        networks: {name: network}.
        world: the processes and their device.
        keep: number of images, evenly spread over the source, whose features are kept. sFID's features are never kept.
        progress: called after each batch.

    Raises:
        UserError: no network, a negative `keep`, or an error in the data.
    """
    if not networks or keep < 0:
        raise UserError(f"a reference needs at least one network, and keep must be at least 0, not {keep}")
    loader = reference_loader(data)
    loader.announce(world)
    keep = min(keep, len(loader))
    measured = {
        name: _Measured(network, 0 if name.endswith("_spatial") else keep, len(loader))
        for name, network in networks.items()
    }
    shown = counted(progress, "reference", len(loader), world.size)
    score_stream(images_of(loader.once(BATCH, world), world), list(measured.values()), world, shown)
    gaussians = {name: Gaussian.of(part.moments) for name, part in measured.items()}
    features = {name: part.features for name, part in measured.items() if part.keep}
    names, sizes = listing(data.address) or (None, None)
    about = About(
        source=absolute(data.address),
        split=data.split,
        image_size=data.image_size,
        count=next(iter(gaussians.values())).count,
        names=names,
        sizes=sizes,
        resize={name: network.resize for name, network in networks.items()},
        weights={name: weights_of(network) for name, network in networks.items()},
        classes=_class_counts(loader),
        class_names=loader.classes or None,
    )
    return replace(_reference(f"{data.source} ({data.split})", about, gaussians, features), measured=True)
