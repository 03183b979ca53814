"""Does a transformer need a lot of data? Test accuracy against the number of labelled images.

    python tests/measure_data_efficiency.py [--out DIR]      about ten minutes on two CPU cores

Three learners of about the same size, with the same optimiser: the vision transformer of lesson 2, a
convolutional network, and the same transformer pre-trained on all training images, without labels, to fill in hidden
patches (Xie et al. 2022). Each learns from 1 %, 4 % and 16 % of the training set, with three seeds.
"""

import copy
import importlib
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from classifiers import to_range
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lesson_tools as tools

lesson2 = importlib.import_module("02_attention")

SHARES, SEEDS = (0.01, 0.04, 0.16), 3
STEPS, PRETRAINING_STEPS = 1000, 3000
PATCH, BATCH = 7, 64
HIDDEN = 0.5  # share of the patches that pre-training hides


class ConvolutionalNet(nn.Sequential):
    """Five 3×3 convolutions, three of them with stride 2, then the mean over all pixels."""

    def __init__(self, n_classes, width=27):
        channels, layers = (1, width, 2 * width, 2 * width, 4 * width, 4 * width), []
        for before, after, stride in zip(channels, channels[1:], (2, 2, 1, 2, 1), strict=False):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(1, after), nn.GELU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, n_classes))


def train(parameters, loss, images, steps, generator, name):
    """AdamW with warm-up and cosine decay on random batches. loss: a function of the chosen images' indices."""

    def rate(step):
        return min(1, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2

    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in trange(steps, desc=name, leave=False, disable=None):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(chosen).backward()
        optimizer.step()
        schedule.step()


def hide_patches(x, hidden):
    """Set the pixels of hidden patches to zero, a middle grey. hidden: bool `(n, s)`."""
    size = x.shape[-1] // PATCH
    mask = hidden.unflatten(1, (1, size, size)).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)  # n 1 h w
    return x.masked_fill(mask, 0)


def pretrain(model, images, generator):
    """Teach the transformer to fill in hidden patches: the loss is the squared error of their pixels."""
    fill_in = nn.Linear(model.classify.in_features, PATCH**2)

    def loss(chosen):
        x = to_range(images[chosen])
        patches = model.to_patches(x)  # n s (p q)
        hidden = torch.rand(patches.shape[:2], generator=generator) < HIDDEN
        return F.mse_loss(fill_in(model.encode(hide_patches(x, hidden)))[hidden], patches[hidden])

    parameters = [*model.parameters(), *fill_in.parameters()]
    train(parameters, loss, images, PRETRAINING_STEPS, generator, "pre-training")


def learn(model, images, labels, generator, name):
    """Teach a model the classes."""

    def loss(chosen):
        return F.cross_entropy(model(to_range(images[chosen])), labels[chosen])

    train(model.parameters(), loss, images, STEPS, generator, name)


@torch.no_grad()
def accuracy(model, images, labels):
    predicted = torch.cat([model(to_range(batch)).argmax(dim=1) for batch in images.split(1000)])
    return (predicted == labels).float().mean().item()


def measure(train_set, test_set):
    """Test accuracies in %: a dictionary from each learner's name to `(shares, seeds)`."""
    images, labels = (torch.from_numpy(array) for array in (train_set.images, train_set.labels))
    test_images, test_labels = (torch.from_numpy(array) for array in (test_set.images, test_set.labels))
    n_classes, results = len(train_set.classes), {}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        transformer = lesson2.VisionTransformer(images.shape[-1], PATCH, n_classes=n_classes)
        learners = {"transformer": transformer, "convolutional network": ConvolutionalNet(n_classes)}
        learners["pre-trained transformer"] = pretrained = copy.deepcopy(transformer)
        pretrain(pretrained, images, generator)
        order = torch.randperm(len(images), generator=generator)
        for place, share in enumerate(SHARES):
            chosen = order[: round(share * len(images))]
            for name, start in learners.items():
                model, task = copy.deepcopy(start), f"{name}, {len(chosen):,} images, seed {seed}"
                batches = torch.Generator().manual_seed(seed)  # the same for all learners
                learn(model, images[chosen], labels[chosen], batches, task)
                correct = 100 * accuracy(model, test_images, test_labels)
                parameters = sum(parameter.numel() for parameter in model.parameters())
                print(f"{task}, {parameters:,} parameters: {correct:.1f} %", flush=True)
                results.setdefault(name, torch.zeros(len(SHARES), SEEDS))[place, seed] = correct
    return results


def draw(results, sizes, data_name):
    """The means over the seeds, with bars from the smallest to the largest."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for i, (name, values) in enumerate(results.items()):
        mean, beside = values.mean(dim=1), [n * (0.97 + 0.03 * i) for n in sizes]  # so that no bar covers another
        spread = torch.stack([mean - values.amin(dim=1), values.amax(dim=1) - mean])
        axis.errorbar(beside, mean, spread, fmt=("ko--", "k^:", "ks-")[i], capsize=4, label=name)
    axis.set(xscale="log", xlabel="labelled images", ylabel=f"test accuracy on {data_name} (%)")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.legend()
    axis.set_title("With few labels convolution wins; pre-training helps the transformer", fontsize=11)
    return figure


def main():
    options = tools.make_parser(__file__, __doc__).parse_args()
    train_set, test_set = (data.load("auto", split) for split in data.SPLITS)
    results = measure(train_set, test_set)
    sizes = [round(share * len(train_set.labels)) for share in SHARES]
    print(f"\n{train_set.name}: test accuracy in %, mean (smallest to largest of {SEEDS} seeds)")
    print(f"{'':26}" + "".join(f"{f'{n:,} images':>22}" for n in sizes))
    for name, values in results.items():
        cells = (f"{row.mean():.1f} ({row.min():.1f} to {row.max():.1f})" for row in values)
        print(f"{name:26}" + "".join(f"{cell:>22}" for cell in cells))
    tools.save_picture(options.out / "data_efficiency.png", draw, results, sizes, train_set.name)


if __name__ == "__main__":
    tools.run_command(main)
