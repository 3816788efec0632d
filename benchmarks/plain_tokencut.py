"""TokenCut, DINO-seg and the COCO20k selection as one writes them first: what eval_tokencut.py must equal.

The graph is a dense float64 matrix, LAPACK solves the generalised eigenproblem, the object is grown cell by cell, and the
annotations of each image are looked for in the whole list. `python benchmarks/speed.py tokencut` times them side by side.
"""

import numpy as np
import torch
import torch.nn.functional as F
from case import Case
from scipy.linalg import eigh

import eval_tokencut


def plain_eigenvector(feats, tau, eps=1e-5, binary=True):
    """Second smallest v [N] of (D - A) v = lambda D v for the graph A of a map [C, h, w]."""
    cells = F.normalize(feats.flatten(1).T, dim=1)
    cos = (cells @ cells.T).numpy()
    graph = np.where(cos > tau, 1.0, eps) if binary else np.where(cos < tau, eps, cos).astype(float)
    degree = np.diag(graph.sum(axis=1))
    _, vectors = eigh(degree - graph, degree, subset_by_index=[1, 2])
    return vectors[:, 0]


def grow(inside, y, x):
    """The 4-connected part of a mask [h, w] that holds the cell (y, x), as a mask."""
    h, w = inside.shape
    part, front = np.zeros((h, w), bool), [(y, x)]
    while front:
        y, x = front.pop()
        if 0 <= y < h and 0 <= x < w and inside[y, x] and not part[y, x]:
            part[y, x] = True
            front += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return part


def plain_tokencut(feats, tau, eps=1e-5, binary=True):
    """The object in a map [C, h, w]: (eigenvector [h, w], mask [h, w], seed)."""
    h, w = feats.shape[1:]
    v = plain_eigenvector(feats, tau, eps, binary)
    seed = int(np.argmax(np.abs(v)))
    inside = v > v.mean()
    if not inside[seed]:
        v, inside = -v, ~inside
    return v.reshape(h, w), grow(inside.reshape(h, w), *divmod(seed, w)), seed


def plain_dinoseg(attention, mass=0.6):
    """The mask [h, w] of the largest part of those strongest cells of one head [h, w] that hold `mass` of its attention."""
    h, w = attention.shape
    cells = sorted((float(attention[y, x]), y, x) for y in range(h) for x in range(w))
    weak, inside = (1 - mass) * sum(value for value, _, _ in cells), np.ones((h, w), bool)
    for value, y, x in cells:
        weak -= value
        if weak < 0:
            break
        inside[y, x] = False
    parts = [grow(inside, y, x) for y in range(h) for x in range(w) if inside[y, x]]
    return max(parts, key=np.sum)


def plain_box(mask, size):
    """The box x0, y0, x1, y1 around a mask [h, w] of an image of size x size pixels."""
    ys, xs = np.nonzero(mask)
    h, w = mask.shape
    return [xs.min() * size / w, ys.min() * size / h, (xs.max() + 1) * size / w, (ys.max() + 1) * size / h]


def plain_iou(a, b):
    """IoU of two boxes x0, y0, x1, y1."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1] + 1e-7) for box in (a, b)]
    return inter / (sum(areas) - inter + 1e-7)


def plain_select(instances, names):
    """The images `names` of a COCO annotation file, and their annotations."""
    images, annotations = [], []
    for image in instances["images"]:
        if image["file_name"] in names:
            images.append(image)
            annotations += [a for a in instances["annotations"] if a["image_id"] == image["id"]]
    return {"images": images, "annotations": annotations}


# ---- what benchmarks/speed.py times ---------------------------------------------------------------------------------


def blobs(side, channels=384, seed=0):
    """A map [C, side, side] as of a photo: regions that fade into each other, of a few kinds, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    kinds = F.interpolate(torch.randn(1, 6, 4, 4, generator=generator), size=(side, side), mode="bicubic")[0]
    mixed = torch.einsum("ck,khw->chw", torch.randn(channels, 6, generator=generator), kinds)
    return mixed + 0.5 * torch.randn(channels, side, side, generator=generator)


def coco_instances(images, boxes, seed=0):
    """Annotations as large as COCO's: dicts of `images` images and `boxes` boxes, each with an outline of 40 numbers."""
    random = np.random.RandomState(seed)
    owners, sides = random.randint(images, size=boxes).tolist(), random.rand(boxes, 4).round(2).tolist()
    return {
        "images": [{"id": 7 * i, "file_name": f"COCO_train2014_{i:012}.jpg", "height": 480, "width": 640} for i in range(images)],
        "annotations": [
            {"id": i, "image_id": 7 * owner, "bbox": box, "iscrowd": 0, "segmentation": [box * 10]}
            for i, (owner, box) in enumerate(zip(owners, sides))
        ],
    }


def eigen_case(side, target, memory=None):
    """The whole cut of a map of side x side cells, paired."""

    def setup():
        feats = blobs(side)
        return lambda: plain_tokencut(feats, 0.2), lambda: eval_tokencut.tokencut(feats, 0.2)

    def same(plain, ours):
        assert plain[2] == ours.seed and (plain[1] == ours.mask).all()
        np.testing.assert_allclose(ours.heat / ours.heat.max(), plain[0] / plain[0].max(), atol=1e-3)

    return Case(f"tokencut: cut of {side}x{side} cells against dense eigh", target, setup, same, memory)


def select_setup():
    instances = coco_instances(images=4000, boxes=30000)
    names = [image["file_name"] for image in instances["images"][::4]]
    return lambda: plain_select(instances, names), lambda: eval_tokencut.select(instances, names)


def same_selection(plain, ours):
    assert plain["images"] == ours["images"]
    assert sorted(a["id"] for a in plain["annotations"]) == [a["id"] for a in ours["annotations"]]


CASES = [
    eigen_case(56, 10.0, memory=3.0),
    eigen_case(28, 1.0),
    Case("tokencut: COCO20k's selection at a twentieth of its size", 20.0, select_setup, same_selection),
]
