"""What a training reads: the images and the encoder, identified by their content instead of their names."""

import logging
import os
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from raekit.config import OnPurpose, configclass
from raekit.data.loader import DataConfig, Loader
from raekit.data.sources import listing
from raekit.inference.cached_loader import LatentLoader

_log = logging.getLogger(__name__)


@configclass
class Images:
    """The images of a training. None means that a property is unknown, because only their cached latents are there.

    Attributes:
        count: Number of images.
        classes: Number of images in each class.
        names: Digest of the names of the files (`listing`).
        sizes: Digest of the sizes of the files (`listing`).
    """

    count: int
    classes: dict[str, int] | None
    names: str | None
    sizes: str | None


@configclass
class Inputs:
    """What a training reads. Attributes that do not apply to a stage are None.

    Attributes:
        data: The images.
        labels: Digest of the class names in label order, if the model learns classes.
        encoder: Fingerprint of the frozen encoder.
        statistics: Fingerprint of the latent statistics of the frozen autoencoder.
    """

    data: OnPurpose[Images]
    labels: str | None = None
    encoder: str | None = None
    statistics: str | None = None


def describe_images(config: DataConfig, loader: Loader | LatentLoader) -> Images:
    """Describe the images that `loader` reads."""
    classes = None
    if isinstance(loader, Loader):
        labels = loader.source.labels
        counts = np.bincount(labels[labels >= 0], minlength=len(loader.classes))
        classes = dict(zip(loader.classes, counts.tolist(), strict=True))
    names, sizes = known = listing(config.source) or (None, None)
    if isinstance(loader, LatentLoader) and names and known != (loader.info.names, loader.info.sizes):
        _log.warning(
            "the files of %s have changed since its latents were cached; cache the changed images in another folder",
            config.source,
        )
    return Images(count=len(loader), classes=classes, names=names, sizes=sizes)


def labels_digest(classes: Sequence[str]) -> str:
    """Return 16 hexadecimal digits that identify the class names and their order."""
    return blake2b(os.fsencode("\0".join(classes)), digest_size=8).hexdigest()
