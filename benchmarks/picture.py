"""The README's first picture: what a backbone, bilinear upsampling and LiFT see in three photos.

    python benchmarks/picture.py --output assets/demo.png

A row a photo: the backbone's features, doubled bilinearly, and LiFT applied once, twice and four
times, as the colours of one PCA basis a row. The last row cuts one photo into parts: k-means
clusters of its own features, one set of centres for all maps, nobody's labels.

Two of the photos come with scikit-learn (CC BY, see assets/README.md).
"""

import sys
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts lie one folder up

from command import Command, add_backbone_args


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    command.add_argument("--output", required=True, help="the PNG to write")
    command.add_argument("--lift_path", default=str(ROOT / "pretrained/lift_vit_mini16_attend.pth"))
    add_backbone_args(command, model_type="vit_mini16")
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help is answered before the imports that take seconds

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from eval_visualize_feats import Panel, draw_sheet, enlarge, grid_title
from features import Features, build_features
from files import replacing
from lift import double
from photos import fit, pca_rgb, read_image

SIDE = 224  # pixels of the shorter side, at which the backbone reads a photo
PANEL = (252, 168)
PARTS = 5  # k-means clusters
COLOURS = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (204, 121, 167)], np.uint8
)  # Okabe and Ito's


def maps_of(features: Features, photo: Image.Image) -> dict[str, Tensor]:
    """{title: map [C, h, w]} of a photo; `features` applies LiFT four times."""
    with torch.no_grad():
        steps = features(to_tensor(photo)[None], return_all=True)
    maps = {"backbone": steps[0], "bilinear": double(steps[0]), "LiFT": steps[1]}
    maps["LiFT, twice"] = steps[2]
    maps["LiFT, 4 times"] = steps[4]
    return {title: feats[0] for title, feats in maps.items()}


def parts_of(maps: dict[str, Tensor]) -> list[np.ndarray]:
    """Each map cut into PARTS clusters of unit features, as colours [h, w, 3]."""
    cells = {title: F.normalize(feats.flatten(1).t(), dim=1) for title, feats in maps.items()}
    # as many cells of each map, so that the finest does not decide alone
    random = np.random.RandomState(0)
    drawn = [unit[random.randint(len(unit), size=1000)] for unit in cells.values()]
    kmeans = KMeans(PARTS, n_init=10, random_state=0).fit(torch.cat(drawn).numpy())
    pictures = []
    for title, feats in maps.items():
        labels = kmeans.predict(cells[title].numpy())
        pictures.append(COLOURS[labels].reshape(*feats.shape[1:], 3))
    return pictures


def row_of(
    how: str, photo: Image.Image, maps: dict[str, Tensor], pictures: list[np.ndarray]
) -> list[Panel]:
    """A row of the sheet: the photo, and a picture for each map; `how` says how they were made."""
    row = [Panel(f"photo\n{how}", photo.resize(PANEL, Image.Resampling.LANCZOS))]
    for (title, feats), colours in zip(maps.items(), pictures):
        picture = enlarge(Image.fromarray(colours), PANEL)
        row.append(Panel(grid_title(title, feats.shape[1:]), picture))
    return row


def main(args: Namespace) -> None:
    """Draw all rows, and write the picture."""
    if not args.lift_path:
        raise ValueError("the picture shows LiFT: pass --lift_path FILE")
    features = build_features(Namespace(**vars(args), lift_iter=4, upsample=None))
    photos = [Image.fromarray(load_sample_image(name)) for name in ("flower.jpg", "china.jpg")]
    photos.insert(0, read_image(ROOT / "assets/sample.jpg"))

    rows = []
    for photo in photos:
        fitted = fit(photo, features.patch, SIDE)
        maps = maps_of(features, fitted)
        rows.append(row_of("PCA as RGB", fitted, maps, pca_rgb(list(maps.values()))))
    rows.append(row_of(f"{PARTS} k-means clusters", fitted, maps, parts_of(maps)))
    with replacing(args.output) as temporary:
        draw_sheet(rows, 18).save(temporary, optimize=True)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    parser().run(main)
