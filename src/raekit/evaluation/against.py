"""References, the networks they were measured in, and the metrics that they allow."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from raekit.data.loader import DataConfig
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import (
    ClassifierFeatures,
    InceptionFeatures,
    Part,
    ReferenceNetwork,
    VGGFeatures,
    encoder_name,
    load_networks,
    weights_of,
)
from raekit.evaluation.frechet import Gaussian
from raekit.evaluation.manifold import KID_SIZE, KernelDistance, Manifold, PrecisionRecall
from raekit.evaluation.metrics import (
    FDR6,
    Accumulator,
    ClassAccuracy,
    FrechetDistance,
    FrechetRatio,
    InceptionScore,
    frechet_name,
)
from raekit.evaluation.references import Reference, measure_reference
from raekit.models.conditioning import same_classes
from raekit.models.pooled import POOLED
from raekit.models.registry import REGISTRY
from raekit.progress import Progress, silent


def find_networks(
    references: Sequence[Reference], features: Sequence[str], device: torch.device
) -> dict[str, ReferenceNetwork]:
    """Load the networks that references have statistics of.

    Args:
        references: the references.
        features: the networks to take, as `load_networks` names them. Default: all of the references' networks that
            are Inception or a registered encoder.
        device: where to load the networks.

    Returns:
        {name: network}.

    Raises:
        UserError: no reference has statistics of a network in `features`, or a reference's network is not known.
    """
    networks: dict[str, ReferenceNetwork] = {}
    for name in features or dict.fromkeys(_loading_name(n, each) for each in references for n in each.gaussians):
        loaded = load_networks(name, device)
        held = {n: network for n, network in loaded.items() if any(n in each.gaussians for each in references)}
        if not held:
            references[0].gaussian(next(iter(loaded.values())))  # raises an error that lists what there is
        networks |= {n: network for n, network in held.items() if n not in networks}  # fdr6 has Inception, too
    return networks


class Against:
    """What images are compared with.

    Args:
        references: real images, measured in some networks.
        networks: the networks to compare in, by name.
        device: where to compute.
        relative_to: references of other real images. Each distance is also divided by the distance of these images.

    Raises:
        UserError: two references, or two of `relative_to`, are of one network, or one of them does not fit the
            networks.
    """

    def __init__(
        self,
        references: Sequence[Reference],
        networks: Mapping[str, ReferenceNetwork],
        device: torch.device,
        relative_to: Sequence[Reference] = (),
    ):
        self.references, self.relative_to, self.device = list(references), list(relative_to), device
        self.networks = dict(networks)
        self._manifolds: dict[str, Manifold] = {}  # their radii serve all evaluations
        for group, option in (self.references, "reference"), (self.relative_to, "relative_to"):
            for name, network in self.networks.items():
                having = [each for each in group if name in each.gaussians]
                if len(having) > 1:
                    raise UserError(f"{option}: {having[0].place} and {having[1].place} are both of {name}; give one")
                for each in having:
                    each.gaussian(network)
                    if (resize := each.about.resize.get(name, network.resize)) != network.resize:
                        raise UserError(
                            f"{each.place}: its images were resized for {name} by {resize}, and these would be by "
                            f"{network.resize}; make the reference again (raekit reference)"
                        )
                    if (weights := each.about.weights.get(name)) and weights != weights_of(network):
                        raise UserError(
                            f"{each.place}: was measured with other weights of {name}; name the original network "
                            "(features), or make the reference again (raekit reference)"
                        )
            for each in group:
                if not each.gaussians.keys() & self.networks.keys():
                    raise UserError(f"{each.place}: has statistics of none of {', '.join(self.networks)}")
        inception = next((self.networks[n] for n in ("inception", "inception_spatial") if n in self.networks), None)
        if isinstance(inception, Part) and isinstance(inception.whole, InceptionFeatures):
            self.networks[inception.whole.logits.name] = inception.whole.logits  # its score needs no reference
        self.judges: list[ClassifierFeatures] = []  # their accuracy needs no reference either
        for network in list(self.networks.values()):
            if isinstance(network, Part) and isinstance(network.whole, ClassifierFeatures):
                self.judges.append(network.whole)
        self.networks |= {judge.logits.name: judge.logits for judge in self.judges}

    def pairs(self) -> Iterator[tuple[Reference, ReferenceNetwork]]:
        """Yield each network of a reference with that reference."""
        for name, network in self.networks.items():
            if reference := next((each for each in self.references if name in each.gaussians), None):
                yield reference, network

    @property
    def has_fdr6(self) -> bool:
        """Whether the distances have all networks of FDr6, and no references to divide them by."""
        return not self.relative_to and FDR6.keys() <= {network.name for _, network in self.pairs()}

    def check_size(self, image_size: int) -> None:
        """UserError if images of `image_size` must not be compared with the references."""
        for each in (*self.references, *self.relative_to):
            each.check_size(image_size)

    def complete(self, world: World, progress: Progress = silent) -> None:
        """Measure the features of the images that reference files hold, as ADM's do. All processes call it."""
        for number, each in enumerate(self.references):
            lacking = {
                name: network
                for name, network in self.networks.items()
                if name in each.gaussians and name not in each.features and not name.endswith("_spatial")
            }
            if each.images and each.about.image_size and lacking:
                data = DataConfig(source=each.images, split="all", image_size=each.about.image_size)
                measured = measure_reference(data, lacking, world, keep=2**24, progress=progress)
                self.references[number] = replace(each, features={**each.features, **measured.features})

    def distances(self, prefix: str) -> list[Accumulator]:
        """Return the Frechet distances, one for each network, with a letter in front of their names (`rfid`)."""
        return [
            FrechetDistance(network, reference.gaussian(network), f"{prefix}{frechet_name(network)}")
            for reference, network in self.pairs()
        ]

    def judges_of(self, classes: Sequence[str]) -> list[ClassifierFeatures]:
        """Return the classifiers of the classes `classes`."""
        return [judge for judge in self.judges if same_classes(classes, judge.network.config.class_names)]

    def accumulators(self, count: int, intervals: bool = False, classes: Sequence[str] = ()) -> list[Accumulator]:
        """Return the metrics that `count` images with labels of `classes` allow.

        Frechet distances, and ratios where `relative_to` has the network, or FDr6; the Inception Score; precision,
        recall and KID where the reference has the features of enough single images.
        """
        published = FDR6 if self.has_fdr6 else {}
        distances: list[FrechetDistance] = []
        ratios: list[tuple[FrechetDistance, Gaussian | float]] = []
        others: list[Accumulator] = []
        for reference, network in self.pairs():
            distance = FrechetDistance(network, reference.gaussian(network), intervals=intervals)
            other = next((each for each in self.relative_to if network.name in each.gaussians), None)
            if other:
                ratios.append((distance, other.gaussian(network)))
            elif network.name in published:
                ratios.append((distance, published[network.name]))
            else:
                distances.append(distance)
            features = reference.features.get(network.name)
            if features is not None:
                if min(count, len(features)) > 3:
                    if network.name not in self._manifolds:
                        self._manifolds[network.name] = Manifold(features.to(self.device))
                    others.append(PrecisionRecall(network, self._manifolds[network.name], intervals))
                if min(count, len(features)) >= KID_SIZE:
                    others.append(KernelDistance(network, features.to(self.device)))
        if "inception_logits" in self.networks:
            others.append(InceptionScore(self.networks["inception_logits"], count))
        others += [ClassAccuracy(each.logits, each.pool.name, intervals) for each in self.judges_of(classes)]
        if ratios:
            divided, baselines = zip(*ratios, strict=True)
            others.insert(0, FrechetRatio(divided, baselines, "fdr6" if published else "fdr_mean"))
        return [*distances, *others]


def _loading_name(name: str, reference: Reference) -> str:
    """Return the name by which `load_networks` loads the network that a reference calls `name`."""
    for inception in "clean_inception", "inception":
        if name in (inception, f"{inception}_spatial"):
            return inception
    if name == VGGFeatures.name:
        return name
    if name in POOLED:
        return "fdr6"
    if name == "emoji_classifier":
        return "classifier:builtin:emoji"
    for encoder in (*REGISTRY, "builtin:vit-tiny"):
        if encoder_name(encoder) == name:
            return encoder
    raise UserError(
        f"{reference.place}: has statistics of {name}, which is not a registered encoder; give the network's place, or "
        "other networks (features)"
    )
