"""How good are the samples of lessons 3 and 4? Two classifiers measure them.

    python tests/measure_quality.py CHECKPOINT [--n N] [--steps S] [--guidance W]

It prints three measures, for the samples, for as many training images (the target) and for white
noise: the Fréchet distance to the test images (as in FID, but in the features of two small classifiers trained on
Fashion-MNIST); the class accuracy, the share that a classifier assigns to the class asked for; and the distance to the
nearest training image, which shows whether the network copies.
"""

import argparse
import functools
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

import classifiers
import numpy as np
import torch
from classifiers import ARCHITECTURES, to_range
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lesson_tools as tools

lesson3 = importlib.import_module("03_unet_uncond")
lesson4 = importlib.import_module("04_unet_cond")


# %% The samples
NETWORKS = {
    "UntimedUNet": functools.partial(lesson3.make_network, network_class=lesson3.UntimedUNet),
    "TimeUNet": lesson3.make_network,
    "CondUNet": lesson4.make_network,
}


def load_denoiser(path, device):
    """The averaged denoiser in a checkpoint of lesson 3 or 4, and its `RunSettings`. Raises UserError."""
    checkpoint = tools.load_checkpoint(path, lesson3.RunSettings)
    if checkpoint is None or checkpoint["settings"].network not in NETWORKS:
        raise tools.UserError(f"{path}: no checkpoint of lesson 3 or 4")
    return lesson3.load_denoiser(path, NETWORKS[checkpoint["settings"].network], device)


def draw_samples(denoiser, settings, n, steps=lesson3.STEPS, guidance=None, seed=0, below=lesson4.GUIDED_BELOW):
    """n images, float32 (n, 1, height, width) in [-1, 1], and the labels (n,) asked for: the classes in turn.

    guidance: None for a network without labels; the labels returned are then None too. seed: of the noise. below: as in
    `guide`.
    """
    n_classes = 1 if guidance is None else len(settings.classes)
    noise_ids = [(seed, i % n_classes, i // n_classes) for i in range(n)]
    denoise = denoiser if guidance is None else lesson4.guide(denoiser, guidance, below)
    images, _ = lesson3.sample_images(denoise, noise_ids, settings, steps, denoiser.device)
    return images, None if guidance is None else torch.arange(n) % n_classes


class Baselines:
    """The samples' baselines: as many training images, the same number of each class, and white noise."""

    def __init__(self, train, n):
        order = np.random.default_rng(0).permutation(len(train.labels))
        of_class = [order[train.labels[order] == label] for label in range(len(train.classes))]
        self.numbers = torch.from_numpy(np.stack(of_class, axis=1).ravel()[:n])  # classes in turn; all equally large
        self.images = to_range(torch.from_numpy(train.images)[self.numbers])
        self.labels = torch.from_numpy(train.labels)[self.numbers]
        self.noise = torch.randn(self.images.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


# %% What the classifiers say
class Quality(NamedTuple):
    """What a classifier says about a set of images."""

    distance: float  # the Fréchet distance to the test images
    accuracy: float | None  # the share assigned to the class asked for, if there was one


def print_table(rows):
    """Print both classifiers' figures, each row when ready. rows: (name, {classifier: Quality}) pairs."""
    print(f"\n{'':26}" + "".join(f"{f'{name}: Fréchet':>20}{'accuracy':>10}" for name in ARCHITECTURES))
    for name, qualities in rows:
        print(f"{name:26}", end="")
        for distance, accuracy in qualities.values():
            print(f"{distance:20.3f}{'-' if accuracy is None else f'{accuracy:.1%}':>10}", end="")
        print(flush=True)


def frechet_distance(a, b):
    """The squared Fréchet distance between two Gaussians, with the means and the covariances A and B of the features a
    (n, d) and b (m, d): |mean_a - mean_b|² + trace(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017)."""
    centred = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    p, q = (np.linalg.qr(x, mode="r") for x in centred)  # A = pᵀ p and B = qᵀ q
    root_trace = np.linalg.norm(p @ q.T, "nuc")  # the eigenvalues of A B are the squared singular values of p qᵀ
    return np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.sum(p**2) + np.sum(q**2) - 2 * root_trace


class Panel:
    """The two classifiers, and their features of the test images."""

    def __init__(self, test, device):
        self.classifiers, images = classifiers.load(device), to_range(torch.from_numpy(test.images))
        self.expected = {name: classifiers.look(each, images)[0] for name, each in self.classifiers.items()}

    def measure(self, images, asked=None):
        """`{classifier: Quality}` of float32 images (n, 1, 28, 28) in [-1, 1]. asked: the labels (n,), if any."""
        qualities = {}
        for name, classifier in self.classifiers.items():
            features, taken_for = classifiers.look(classifier, images)
            pair = (x.double().numpy() for x in (features, self.expected[name]))
            accuracy = None if asked is None else float((taken_for == asked).float().mean())
            qualities[name] = Quality(float(frechet_distance(*pair)), accuracy)
        return qualities


# %% Does it copy?
def find_nearest(images, others, but=None, batch_size=250):
    """For each image (n, 1, h, w), the nearest of the others (m, 1, h, w): its index (n,) and its distance (n,), the
    root mean square difference of the pixels. but: for each image, the index (n,) of one that doesn't count."""
    a, b = images.flatten(1), others.flatten(1)
    half_squares = b.square().sum(dim=1) / 2
    found = []
    for chosen in tqdm(torch.arange(len(a)).split(batch_size), desc="nearest images", leave=False, disable=None):
        closeness = a[chosen] @ b.T - half_squares  # |a - b|² = |a|² - 2 closeness
        if but is not None:
            closeness[torch.arange(len(chosen)), but[chosen]] = -torch.inf
        found.append(closeness.argmax(dim=1))
    found = torch.cat(found)
    return found, (a - b[found]).square().mean(dim=1).sqrt()


def measure_copies(images, baselines, train, test, device):
    """Print how close samples and, for comparison, other images come to training images."""
    training_images, test_images = (to_range(torch.from_numpy(part.images)) for part in (train, test))
    sets = {"samples": images, "test images": test_images}
    sets |= {"training images": baselines.images, "white noise": baselines.noise}
    print("\ndistance to the nearest training image (for a training image, to the nearest other one; for a copy, 0)")
    print(f"{'':26}{'median':>10}{'10 %':>10}{'1 %':>10}{'smallest':>10}")
    for name, x in sets.items():
        but = baselines.numbers if name == "training images" else None
        _, distances = find_nearest(x.to(device), training_images.to(device), but)
        print(f"{name:26}" + "".join(f"{distances.quantile(q):10.3f}" for q in (0.5, 0.1, 0.01, 0)))


# %% The measurement of a checkpoint
def measure(options, denoiser, settings, train, test, panel):
    """Print all measures of one checkpoint. The noise isn't that of the guidance sweeps, seed 0."""
    images, labels = draw_samples(denoiser, settings, options.n, options.steps, options.guidance, seed=1)
    baselines = Baselines(train, options.n)
    rows = {"samples": (images, labels), "training images": (baselines.images, baselines.labels)}
    rows["white noise"] = baselines.noise, baselines.labels
    print_table(((name, panel.measure(*row)) for name, row in rows.items()))
    measure_copies(images, baselines, train, test, denoiser.device)


# %% The command
def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, number = parser.add_argument, tools.number
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint.pt of a run of 03 or 04")
    add("--n", metavar="N", type=number(int, 20, 60_000), default=10_000, help="samples (default: %(default)s)")
    add("--steps", metavar="S", type=number(int, 1, 10**6), default=lesson3.STEPS, help="steps (default: %(default)s)")
    add("--guidance", metavar="W", type=number(float, 0, 100), help="guidance strength (default: as in 04)")
    add("--data-dir", metavar="DIR", help="folder with Fashion-MNIST's four files (default: $FASHION_MNIST_DIR)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: cuda if available, else cpu")
    options = parser.parse_args()
    device = tools.choose_device(options.device)
    train, test = (tools.load_data("fashion-mnist", split, options.data_dir) for split in data.SPLITS)
    denoiser, settings = load_denoiser(options.checkpoint, device)
    if options.guidance is not None and settings.network != "CondUNet":
        raise tools.UserError(f"--guidance: {settings.network} in {options.checkpoint} takes no labels; leave it out")
    sources = {
        (part.classes, name) for part, name in ((train, train.name), (test, test.name), (settings, settings.data))
    }
    if sources != {(data.fashion_mnist.CLASSES, "Fashion-MNIST")}:
        raise tools.UserError("the classifiers know only Fashion-MNIST; CHECKPOINT or --data-dir has something else")
    if options.guidance is None and settings.network == "CondUNet":
        options.guidance = lesson4.choose_guidance(settings.images_seen)
    guidance = "" if options.guidance is None else f", guidance {options.guidance:g}"
    print(f"samples   {options.n:,} in {options.steps} steps{guidance}")
    measure(options, denoiser, settings, train, test, Panel(test, device))


if __name__ == "__main__":
    tools.run_command(main)
