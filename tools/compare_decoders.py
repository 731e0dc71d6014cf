"""Score several autoencoders of one encoder on held-out images, for the tables of docs/results.

python tools/compare_decoders.py MODEL... [--source emoji] [--latents FILE] [--features NAME...] [--lpips VGG]
                                 [--pictures FILE.png]

--latents takes a file of `raekit latents generate`, --lpips the file of VGG16's weights that
`raekit.models.perceptual.load_perceptual` reads. The picture has a column for the originals and for each model.
"""

import argparse
from pathlib import Path

import torch

from raekit.data.loader import DataConfig, Loader
from raekit.distributed import World
from raekit.inference.model import reconstruct
from raekit.models.autoencoder import Autoencoder
from raekit.models.perceptual import load_perceptual
from raekit.pictures import grid, to_pil
from raekit.stages.selection import SelectionConfig, scorer

ROWS = 12


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--source", default="emoji")
    parser.add_argument("--latents")
    parser.add_argument("--features", nargs="+", default=["builtin:vit-tiny"])
    parser.add_argument("--lpips", metavar="VGG")
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    models = {name: Autoencoder.load(name) for name in arguments.models}
    first, *others = models.values()
    if any(other.latent_shape != first.latent_shape or other.image_size != first.image_size for other in others):
        parser.error("the models have different latent shapes or image sizes; give models of one encoder")
    data = DataConfig(source=arguments.source, split="heldout", image_size=first.image_size)
    more = {"lpips": load_perceptual(arguments.lpips)} if arguments.lpips else {}
    rows: dict[str, dict[str, float]] = {name: {} for name in models}
    for number, features in enumerate(arguments.features):
        config = SelectionConfig(every=1, latents=arguments.latents, features=features)
        score = scorer(config, data, first.latent_shape, World(), {} if number else more)
        for name, model in models.items():
            values = score(model)
            rows[name] |= {f"{key} ({features})" if key.endswith("_fd") else key: v for key, v in values.items()}
            print(f"{name}, {features}: done", flush=True)
    columns = list(next(iter(rows.values())))
    print("| model | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{values[column]:.4g}" for column in columns) + " |")
    if arguments.pictures:
        images = next(iter(Loader(data, seed=1).stream(0, ROWS, World()))).pixels()
        columns = [images, *(reconstruct(model, images) for model in models.values())]
        tiles = [to_pil(column[row]) for row in range(ROWS) for column in columns]
        grid(tiles, columns=len(columns)).save(arguments.pictures)


if __name__ == "__main__":
    main()
