"""How good are the samples of lesson 4? Measured with a classifier that judges them, run by hand.

    python tests/measure_quality.py CHECKPOINT [--n N] [--steps S] [--guidance W] [--data-dir DIR]

Prints, for the samples, for as many training images (the best that can be expected) and for white noise: the Fréchet
distance to the test images in the judge's features (Heusel et al. 2017), and how many are taken for their class.
"""

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import torch
from judge import get_judge, look, to_range
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
lesson3 = importlib.import_module("03_unet_uncond")
lesson4 = importlib.import_module("04_unet_cond")
data = importlib.import_module("data")
frechet_distance = importlib.import_module("reference_numpy").frechet_distance


def draw_samples(checkpoint, n, steps, guidance, batch_size=250):
    """n images, float32 (n, 1, height, width) in [-1, 1], the classes in turn, and their labels (n,)."""
    run = checkpoint["run"]
    preset = lesson3.PRESETS[run.preset]
    precision = lesson3.choose_precision(torch.device("cpu"))
    network = lesson4.CondUNet.from_preset(preset, len(run.classes))
    denoiser = lesson3.Denoiser(network, run.sigma_data, preset.patch, precision)
    denoiser.load_state_dict(checkpoint["average"])
    denoiser.to(memory_format=torch.channels_last).requires_grad_(False)
    shape = lesson3.pad(torch.empty(1, 1, *run.size), preset).shape[1:]
    labels = torch.arange(n) % len(run.classes)
    noise = torch.stack(
        [lesson3.starting_noise(0, label, i // len(run.classes), shape) for i, label in enumerate(labels.tolist())]
    )
    images = []
    for first in tqdm(range(0, n, batch_size), desc="sampling", leave=False):
        chosen = slice(first, first + batch_size)
        denoise = lesson4.guide(denoiser, labels[chosen], guidance)
        *_, (_, x, _) = lesson3.sample(denoise, noise[chosen], lesson3.noise_levels(steps))
        images.append(lesson3.crop(x, run.size).clamp(-1, 1))
    return torch.cat(images), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="of a run of 04")
    parser.add_argument("--n", type=int, default=10_000, help="samples (%(default)s)")
    parser.add_argument("--steps", type=int, default=18, help="network evaluations for each (%(default)s)")
    parser.add_argument("--guidance", type=float, default=0.5, help="(%(default)s)")
    parser.add_argument("--data-dir", help="folder with the four Fashion-MNIST files, also $FASHION_MNIST_DIR")
    options = parser.parse_args()
    try:
        checkpoint = lesson3.load_checkpoint(options.checkpoint)
        train, test = (data.load("fashion-mnist", split, options.data_dir) for split in data.SPLITS)
    except (lesson3.UserError, data.DataError) as error:
        parser.error(str(error))
    if checkpoint is None or checkpoint["run"].network != "CondUNet":
        parser.error(f"{options.checkpoint}: no checkpoint of lesson 4 there")

    train_images, train_labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    judge = get_judge(train_images, train_labels)
    expected, taken_for = look(judge, to_range(torch.from_numpy(test.images)))
    right = (taken_for.numpy() == test.labels).mean()
    print(f"the judge names {right:.1%} of the test images correctly")
    # in the order of the samples: the classes in turn, in each class at random
    order = np.random.default_rng(0).permutation(len(train.labels))
    of_class = [order[train.labels[order] == label] for label in range(len(train.classes))]
    chosen = np.stack(of_class, axis=1).ravel()[: options.n]  # classes are equally large
    noise = torch.randn(options.n, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images, labels = draw_samples(checkpoint, options.n, options.steps, options.guidance)
    print(f"{'':24}{'Fréchet distance':>18}{'right class':>14}")
    for name, x, asked in (
        (f"{options.n:,} samples", images, labels),
        ("as many training images", to_range(train_images[chosen]), train_labels[chosen]),
        ("white noise", noise.clamp(-1, 1), labels),
    ):
        features, taken_for = look(judge, x)
        distance = frechet_distance(features.double().numpy(), expected.double().numpy())
        print(f"{name:24}{distance:18.3f}{(taken_for == asked).float().mean():14.1%}")


if __name__ == "__main__":
    main()
