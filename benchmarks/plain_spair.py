"""The plain algorithm of SPair-71k keypoint matching: both images of every pair through the network, S x S x C maps.

What eval_spair.py must agree with (tests/test_eval_spair.py) and is timed against (benchmarks/speed.py).
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from case import Case
from PIL import Image
from torchvision.transforms.functional import to_tensor

from eval_spair import evaluate, match_pairs, read_pairs
from extractor import ViTExtractor
from lift import LiFT


def plain_map(features, path, size):
    """Descriptors [C, S, S] of an image on its black square, its scale, and its offset (x, y) there."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    scale = size / max(width, height)
    if width >= height:
        small = image.resize((size, int(np.around(size * height / width))), Image.LANCZOS)
        x, y = 0, int((size - small.height) / 2)
    else:
        small = image.resize((int(np.around(size * width / height)), size), Image.LANCZOS)
        x, y = int((size - small.width) / 2), 0
    square = Image.new("RGB", (size, size))
    square.paste(small, (x, y))
    feats = F.normalize(features(to_tensor(square)[None]), dim=1)                                 # [1, C, h, w]
    return F.interpolate(feats, (size, size), mode="bilinear", align_corners=False)[0], scale, (x, y)


def plain_pair(features, path, root, size, cosine=False):
    """One pair: predicted and annotated points [K, 2] (x, y) in the target square, and the box's longer side."""
    entry = json.loads(path.read_text())
    images = Path(root, "JPEGImages", entry["category"])
    source, source_scale, source_offset = plain_map(features, images / entry["src_imname"], size)
    target, target_scale, target_offset = plain_map(features, images / entry["trg_imname"], size)
    if cosine:
        source, target = F.normalize(source, dim=0), F.normalize(target, dim=0)
    predicted, truth = [], []
    for from_point, to_point in zip(entry["src_kps"], entry["trg_kps"]):
        x, y = (c * source_scale + o for c, o in zip(from_point, source_offset))
        similarity = source[:, int(np.floor(y)), int(x)] @ target.flatten(1)                      # [S*S]
        best = int(similarity.argmax())
        predicted.append([best % size, best // size])
        truth.append([c * target_scale + o for c, o in zip(to_point, target_offset)])
    x0, y0, x1, y1 = entry["trg_bndbox"]
    return torch.tensor(predicted), torch.tensor(truth), max(y1 - y0, x1 - x0) * target_scale


def plain_spair(features, root, size, alphas=(0.1, 0.05, 0.01), cosine=False):
    """PCK over all test pairs, as eval_spair.evaluate gives it, and the predicted points of every pair."""
    results, predictions = {}, []
    for category in sorted(os.listdir(Path(root, "JPEGImages"))):
        hits, pairs = {alpha: [] for alpha in alphas}, 0
        for path in sorted(Path(root, "PairAnnotation/test").glob(f"*[:_]{category}.json")):
            predicted, truth, extent = plain_pair(features, path, root, size, cosine)
            for alpha in alphas:
                for p, t in zip(predicted, truth):
                    hits[alpha].append(float((p - t).norm() < alpha * extent))
            predictions.append(predicted)
            pairs += 1
        results[category] = {"pairs": pairs, "keypoints": len(hits[alphas[0]])}
        results[category] |= {f"pck@{alpha}": 100 * np.mean(hits[alpha]) for alpha in alphas}
    results["mean"] = {f"pck@{a}": np.mean([row[f"pck@{a}"] for row in results.values()]) for a in alphas}
    return results, predictions


def write_tree(root, categories=("cat", "dog"), images=3, keypoints=5, separator=":", seed=0):
    """A small SPair-71k below `root`: smooth random images of several shapes, all ordered pairs of each category."""
    random, shapes = np.random.RandomState(seed), [(120, 90), (90, 120), (100, 100), (127, 61)]
    annotations = Path(root, "PairAnnotation/test")
    annotations.mkdir(parents=True)
    for category in categories:
        folder = Path(root, "JPEGImages", category)
        folder.mkdir(parents=True)
        sizes = [shapes[i % len(shapes)] for i in range(images)]
        for i, size in enumerate(sizes):
            noise = Image.fromarray(random.randint(0, 256, (9, 9, 3), dtype=np.uint8))
            noise.resize(size, Image.BICUBIC).save(folder / f"{i:04d}.jpg", quality=95)
        for s, t in ((s, t) for s in range(images) for t in range(images) if s != t):
            points = [(random.rand(keypoints, 2) * sizes[i]).astype(int).tolist() for i in (s, t)]
            entry = {"src_imname": f"{s:04d}.jpg", "trg_imname": f"{t:04d}.jpg", "category": category}
            entry |= {"src_kps": points[0], "trg_kps": points[1], "trg_bndbox": [5, 4, 55, 50]}
            (annotations / f"{s:03d}{t:03d}-{s:04d}-{t:04d}{separator}{category}.json").write_text(json.dumps(entry))
    return Path(root)


# ---- speed ----------------------------------------------------------------------------------------------------------


def setup(root, size):
    """(plain, ours) for all pairs below `root` with ViT-S/16 and one LiFT, both of random weights."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224.dino", num_classes=0)
    extractor, lift = ViTExtractor("dino_vits16", model=vit, device="cpu"), LiFT(384).eval().requires_grad_(False)

    def features(images):
        images = extractor.normalize(images)
        return lift(images, extractor(images))

    def ours():
        matches = match_pairs(features, read_pairs(root, per_category=0), size)
        return evaluate(matches), [match.predicted for match in matches]

    return lambda: plain_spair(features, root, size), ours


def setup_shared(size=224):
    """The 22 pairs of the shared sample."""
    root = Path(os.environ.get("LIFT_SHARED", Path(__file__).parents[2] / "shared"), "data/SPair-71k")
    if not root.is_dir():
        raise FileNotFoundError(f"no sample of SPair-71k at {root}: set LIFT_SHARED")
    return setup(root, size)


def setup_dense(size=224, images=8):
    """A list in which each image stands in 14 pairs: all ordered pairs of eight."""
    folder = tempfile.TemporaryDirectory()
    plain, ours = setup(write_tree(folder.name, ("cat",), images, keypoints=8), size)
    ours.folder = folder  # lives as long as the callables
    return plain, ours


def same(plain, ours):
    """At least 95 % of the predicted pixels and PCK within one point: cells at the border make ties that rounding parts."""
    equal = torch.cat([(p == o).all(dim=1) for p, o in zip(plain[1], ours[1])]).double().mean().item()
    assert equal >= 0.95, f"{100 * equal:.1f} % of the predictions agree"
    for name, row in plain[0].items():
        assert ours[0][name].keys() == row.keys()
        assert all(abs(ours[0][name][key] - value) < 1 for key, value in row.items()), name


CASES = [
    Case("SPair, 22 pairs at 224, S/16 + LiFT", 4, setup_shared, same),
    Case("SPair, each image in 14 pairs, 224, S/16 + LiFT", 12, setup_dense, same),
    Case("SPair, 6 pairs of 3 images at 448, S/16 + LiFT", 1, lambda: setup_dense(448, 3), same, memory=10),
]
