"""All that references allow to be said of images."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from raekit.data.loader import DataConfig
from raekit.distributed import World
from raekit.errors import UserError
from raekit.evaluation.features import InceptionFeatures, Part, ReferenceNetwork, encoder_name, load_networks
from raekit.evaluation.manifold import KernelDistance, Manifold, PrecisionRecall
from raekit.evaluation.metrics import Accumulator, FrechetDistance, FrechetRatio, InceptionScore, frechet_name
from raekit.evaluation.references import Reference, measure_reference
from raekit.models.registry import REGISTRY
from raekit.progress import Progress, silent

_KID_SIZE = 1000


def find_networks(
    references: Sequence[Reference], features: Sequence[str], device: torch.device
) -> dict[str, ReferenceNetwork]:
    """The networks {name: network} that `references` have statistics of.

    `features` chooses, as `load_networks` takes them; by default it is all that are FID's or registered encoders.
    UserError, naming it, for one that is in no reference, or of which nothing is known.
    """
    networks: dict[str, ReferenceNetwork] = {}
    for name in features or dict.fromkeys(_loaded_by(n, each) for each in references for n in each.gaussians):
        loaded = load_networks(name, device)
        held = {n: network for n, network in loaded.items() if any(n in each.gaussians for each in references)}
        if not held:
            references[0].gaussian(next(iter(loaded.values())))  # tells what there is
        networks |= held
    return networks


class Against:
    """What images are compared with: `references` in the features of `networks`, and `baselines`, other real images, to
    whose distance from the references that of the images is given as a ratio.

    UserError if two references, or two baselines, are of one network, or if one does not fit the networks.
    """

    def __init__(
        self,
        references: Sequence[Reference],
        networks: Mapping[str, ReferenceNetwork],
        device: torch.device,
        baselines: Sequence[Reference] = (),
    ):
        self.references, self.baselines, self.device = list(references), list(baselines), device
        self.networks = dict(networks)
        for group, kind in (self.references, "reference"), (self.baselines, "baseline"):
            for name, network in self.networks.items():
                having = [each for each in group if name in each.gaussians]
                if len(having) > 1:
                    raise UserError(f"{kind}s: {having[0].place} and {having[1].place} are both of {name}; give one")
                for each in having:
                    each.gaussian(network)
                    if (resize := each.about.resize.get(name, network.resize)) != network.resize:
                        raise UserError(
                            f"{each.place}: its images were resized for {name} by {resize}, these would be by "
                            f"{network.resize}; make the reference again (raekit reference)"
                        )
            for each in group:
                if not each.gaussians.keys() & self.networks.keys():
                    raise UserError(f"{each.place}: has statistics of none of {', '.join(self.networks)}")
        inception = next((self.networks[n] for n in ("inception", "inception_spatial") if n in self.networks), None)
        if isinstance(inception, Part) and isinstance(inception.whole, InceptionFeatures):
            self.networks[inception.whole.logits.name] = inception.whole.logits  # its score needs no reference

    def check_size(self, image_size: int) -> None:
        """UserError if images of `image_size` must not be compared with these."""
        for each in (*self.references, *self.baselines):
            each.check_size(image_size)

    def complete(self, world: World, progress: Progress = silent) -> None:
        """Measure the features of the images that references hold themselves, as ADM's do; called by all processes."""
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

    def reconstruction_accumulators(self) -> list[Accumulator]:
        """One for the Frechet distance of reconstructions in each network: `rfid` and `rfd_` and the network's name."""
        return [
            FrechetDistance(network, each.gaussian(network), f"r{frechet_name(network)}")
            for name, network in self.networks.items()
            for each in self.references
            if name in each.gaussians
        ]

    def accumulators(self, count: int, intervals: bool = False) -> list[Accumulator]:
        """One for each metric that `count` images allow: Frechet distances, and ratios where there are baselines; the
        Inception Score; precision, recall and KID where the reference has the features of enough single images."""
        distances: list[FrechetDistance] = []
        ratios: list[tuple[FrechetDistance, Reference]] = []
        others: list[Accumulator] = []
        for name, network in self.networks.items():
            if name == "inception_logits":
                others.append(InceptionScore(network))
                continue
            reference = next(each for each in self.references if name in each.gaussians)
            distance = FrechetDistance(network, reference.gaussian(network), intervals=intervals)
            baseline = next((each for each in self.baselines if name in each.gaussians), None)
            if baseline:
                ratios.append((distance, baseline))
            else:
                distances.append(distance)
            features = reference.features.get(name)
            if features is not None:
                manifold = Manifold(features.to(self.device))
                if count > manifold.k:
                    others.append(PrecisionRecall(network, manifold, intervals))
                if min(count, len(features)) >= _KID_SIZE:
                    others.append(KernelDistance(network, manifold.features, size=_KID_SIZE))
        if ratios:
            gaussians = [baseline.gaussian(distance.network) for distance, baseline in ratios]
            others.insert(0, FrechetRatio([distance for distance, _ in ratios], gaussians))
        return [*distances, *others]


def _loaded_by(name: str, reference: Reference) -> str:
    """What `load_networks` has to be told for the network that a reference calls `name`."""
    for inception in "clean_inception", "inception":
        if name in (inception, f"{inception}_spatial"):
            return inception
    for encoder in (*REGISTRY, "builtin:vit-tiny"):
        if encoder_name(encoder) == name:
            return encoder
    raise UserError(
        f"{reference.place}: has statistics of {name}, which is no registered encoder: say by --features where it is, "
        "or which others to take"
    )
