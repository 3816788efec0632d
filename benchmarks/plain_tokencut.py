"""TokenCut, DINO-seg and the COCO20k selection as their releases do them.

This is what eval_tokencut.py and voc_coco.py must equal. The graph is a dense float64 matrix,
LAPACK solves the generalised eigenproblem, the object is grown cell by cell, and the annotations of
each image are looked for in the whole list. `python benchmarks/speed.py tokencut` times them side
by side.

Notation: C channels, h w the grid of a map, N = h*w cells.
"""

from collections import defaultdict
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from case import Case
from scipy.linalg import eigh
from scipy.ndimage import label
from scipy.sparse.linalg import eigsh

import eval_tokencut
import voc_coco


def plain_eigenvector(feats, tau, eps=1e-5, binary=True):
    """The eigenvector v [N] of the second smallest lambda in (D - A) v = lambda D v.

    A is the graph of a map [C, h, w], and D the diagonal of its row sums.
    """
    cells = F.normalize(feats.flatten(1).T, dim=1)  # [N, C]
    cosine = (cells @ cells.T).numpy()              # [N, N]
    if binary:
        graph = np.where(cosine > tau, 1.0, eps)
    else:
        graph = np.where(cosine < tau, eps, cosine).astype(float)
    degree = np.diag(graph.sum(axis=1))
    # the second and third eigenvectors; the second is wanted, and two cells have no third
    last = min(2, len(graph) - 1)
    _, vectors = eigh(degree - graph, degree, subset_by_index=[1, last])
    return vectors[:, 0]


def grow(inside, y, x):
    """The 4-connected part of a mask [h, w] that holds the cell (y, x), as a mask."""
    height, width = inside.shape
    part = np.zeros((height, width), dtype=bool)
    front = [(y, x)]
    while front:
        y, x = front.pop()
        if 0 <= y < height and 0 <= x < width and inside[y, x] and not part[y, x]:
            part[y, x] = True
            front += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return part


def plain_tokencut(feats, tau, eps=1e-5, binary=True):
    """The object in a map [C, h, w]: eigenvector [h, w], mask [h, w], number of the seed cell."""
    height, width = feats.shape[1:]
    v = plain_eigenvector(feats, tau, eps, binary)
    seed = int(np.argmax(np.abs(v)))
    inside = v > v.mean()  # one side of the cut; the object's is that of the seed
    if not inside[seed]:
        v = -v
        inside = ~inside
    y, x = divmod(seed, width)
    mask = grow(inside.reshape(height, width), y, x)
    return v.reshape(height, width), mask, seed


def plain_dinoseg(attention, mass=0.6):
    """The object in one head's attention [h, w], by DINO-seg, as a mask [h, w].

    It is the largest connected part of the strongest cells that together hold `mass` of the
    attention.
    """
    height, width = attention.shape
    cells = []
    for y in range(height):
        for x in range(width):
            cells.append((float(attention[y, x]), y, x))
    cells.sort()  # the weakest first

    # leave out the weakest cells, as long as they hold no more than the rest
    left = (1 - mass) * sum(value for value, _, _ in cells)
    inside = np.ones((height, width), dtype=bool)
    for value, y, x in cells:
        left -= value
        if left < 0:
            break
        inside[y, x] = False

    largest = np.zeros((height, width), dtype=bool)
    for _, y, x in cells:
        if inside[y, x]:
            part = grow(inside, y, x)
            if part.sum() > largest.sum():
                largest = part
    return largest


def plain_box(mask, size):
    """The box x0, y0, x1, y1 around a mask [h, w] of an image of size x size pixels."""
    ys, xs = np.nonzero(mask)
    height, width = mask.shape
    left, right = xs.min() * size / width, (xs.max() + 1) * size / width
    top, bottom = ys.min() * size / height, (ys.max() + 1) * size / height
    return [left, top, right, bottom]


def plain_iou(a, b):
    """IoU of two boxes x0, y0, x1, y1, with 1e-7 on heights and union as in YOLOv5."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    overlap = width * height
    area_a = (a[2] - a[0]) * (a[3] - a[1] + 1e-7)
    area_b = (b[2] - b[0]) * (b[3] - b[1] + 1e-7)
    return overlap / (area_a + area_b - overlap + 1e-7)


def plain_select(instances, names):
    """The images `names` of a COCO annotation file, and their annotations."""
    images = []
    annotations = []
    for image in instances["images"]:
        if image["file_name"] in names:
            images.append(image)
            for annotation in instances["annotations"]:
                if annotation["image_id"] == image["id"]:
                    annotations.append(annotation)
    return {"images": images, "annotations": annotations}


# ---- what one would write today -----------------------------------------------------------------


def todays_tokencut(feats, tau, eps=1e-5):
    """plain_tokencut with scipy's Lanczos and labels, in double precision."""
    height, width = feats.shape[1:]
    cells = F.normalize(feats.flatten(1).T, dim=1)  # [N, C]
    cosine = (cells @ cells.T).numpy()              # [N, N]
    graph = np.where(cosine > tau, 1.0, eps)

    # the largest eigenvalues of D^-1/2 A D^-1/2 are the smallest of the cut; eigsh sorts the two
    # upwards, so the first of them is the second largest
    scale = 1 / np.sqrt(graph.sum(axis=1))
    _, vectors = eigsh(graph * scale[:, None] * scale, k=2, which="LA")
    v = scale * vectors[:, 0]

    seed = int(np.argmax(np.abs(v)))
    inside = v > v.mean()
    if not inside[seed]:
        v = -v
        inside = ~inside
    labels, _ = label(inside.reshape(height, width))
    return v.reshape(height, width), labels == labels.flat[seed], seed


def todays_select(instances, names):
    """plain_select with an index of the annotations by image, as pycocotools builds it."""
    by_image = defaultdict(list)
    for annotation in instances["annotations"]:
        by_image[annotation["image_id"]].append(annotation)

    wanted = set(names)
    images = []
    annotations = []
    for image in instances["images"]:
        if image["file_name"] in wanted:
            images.append(image)
            annotations += by_image[image["id"]]
    return {"images": images, "annotations": annotations}


# ---- what benchmarks/speed.py times -------------------------------------------------------------


def blobs(side, channels=384, seed=0):
    """A map [C, side, side] as of a photo.

    Regions of six kinds, each with a descriptor of its own, fade into each other, with some noise.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 6, 4, 4, generator=generator)
    kinds = F.interpolate(coarse, size=(side, side), mode="bicubic")[0]  # [6, side, side]
    descriptors = torch.randn(channels, 6, generator=generator)
    mixed = torch.einsum("ck,khw->chw", descriptors, kinds)
    return mixed + 0.5 * torch.randn(channels, side, side, generator=generator)


def coco_instances(images, boxes, seed=0):
    """Annotations as large as COCO's: every box comes with an outline of 40 numbers.

    Args:
        images: how many images.
        boxes: how many boxes; each belongs to an image at random.
    """
    random = np.random.RandomState(seed)
    owners = random.randint(images, size=boxes).tolist()  # the number of each box's image
    corners = random.rand(boxes, 4).round(2).tolist()

    # as in COCO, the id of an image is not its place in the list
    listed = []
    for number in range(images):
        name = f"COCO_train2014_{number:012}.jpg"
        listed.append({"id": 7 * number, "file_name": name, "height": 480, "width": 640})
    annotations = []
    for number, (owner, box) in enumerate(zip(owners, corners)):
        annotation = {"id": number, "image_id": 7 * owner, "bbox": box, "iscrowd": 0}
        annotation["segmentation"] = [box * 10]  # a list of 4, ten times over
        annotations.append(annotation)
    return {"images": listed, "annotations": annotations}


def eigen_case(side, target, memory=None):
    """A Case for the whole cut of a map of side x side cells."""

    def setup():
        feats = blobs(side)
        return (
            partial(plain_tokencut, feats, 0.2),
            partial(eval_tokencut.tokencut, feats, 0.2),
            partial(todays_tokencut, feats, 0.2),
        )

    def same(plain, ours):
        heat, mask, seed = plain
        assert seed == ours.seed
        assert (mask == ours.mask).all()
        # an eigenvector has no length of its own, and each way scales it differently
        np.testing.assert_allclose(ours.heat / ours.heat.max(), heat / heat.max(), atol=1e-3)

    name = f"tokencut: cut of {side}x{side} cells against dense eigh"
    return Case(name, target, setup, same, memory)


def select_setup():
    """The three ways to select every fourth of 4000 images."""
    instances = coco_instances(images=4000, boxes=30000)
    names = [image["file_name"] for image in instances["images"][::4]]
    return (
        partial(plain_select, instances, names),
        partial(voc_coco.select, instances, names),
        partial(todays_select, instances, names),
    )


def same_selection(plain, ours):
    """Assert that two selections hold the same images and annotations.

    The annotations of ours are in the order of their ids, as in the file; the other's go by image.
    """
    assert plain["images"] == ours["images"]
    plain_ids = [annotation["id"] for annotation in plain["annotations"]]
    our_ids = [annotation["id"] for annotation in ours["annotations"]]
    assert sorted(plain_ids) == our_ids


CASES = [
    eigen_case(56, 10.0, memory=3.0),
    eigen_case(28, 1.0),
    Case(
        "tokencut: COCO20k's selection at a twentieth of its size",
        20.0,
        select_setup,
        same_selection,
    ),
]
