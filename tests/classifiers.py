"""Two small Fashion-MNIST classifiers, whose features measure how good samples are. `classifiers.pt` holds them.

The distance between two sets of images is the Fréchet distance, as in FID, but in the features of these networks
(Heusel et al. 2017 use those of Inception, trained on photographs). Distances depend on the network; as everyone has
the same two, everyone's can be compared. `python tests/classifiers.py` trains them, in 18 minutes on two cores.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm, trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import lesson_tools as tools

PATH = Path(__file__).with_suffix(".pt")


class Block(nn.Module):
    """A residual block with batch norm; the first convolution has the stride."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.branch(x))


def residual(width=24):
    """Four residual blocks (after He et al. 2015)."""
    shapes = (width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), *(Block(*shape) for shape in shapes))


def plain(width=32):
    """Six convolutions and max pooling, no shortcuts (after Simonyan and Zisserman 2014, "VGG")."""

    def layer(in_channels, out_channels):
        convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())

    halve, w = nn.MaxPool2d(2), width
    large, middle = (layer(1, w), layer(w, w)), (layer(w, 2 * w), layer(2 * w, 2 * w))
    return nn.Sequential(*large, halve, *middle, halve, layer(2 * w, 4 * w), layer(4 * w, 4 * w))


ARCHITECTURES = {"residual": residual, "plain": plain}


class Classifier(nn.Module):
    """One of the two architectures, average pooling, and a linear layer to ten classes."""

    def __init__(self, name):
        super().__init__()
        self.blocks = ARCHITECTURES[name]()
        self.classify = nn.LazyLinear(10)
        self(torch.zeros(2, 1, 28, 28))  # tells LazyLinear the number of features

    def features(self, x):
        """x: float32 (n, 1, 28, 28) in [-1, 1]. Returns (n, features)."""
        return self.blocks(x).mean(dim=(2, 3))

    def forward(self, x):
        return self.classify(self.features(x))


def augment(images, generator):
    """Shift a batch `(n, 1, 28, 28)` by up to two pixels, and mirror it half the time."""
    dy, dx, mirror = torch.randint(0, 10, (3,), generator=generator).tolist()
    images = F.pad(images, (2, 2, 2, 2), value=-1)[..., dy % 5 : dy % 5 + 28, dx % 5 : dx % 5 + 28]
    return images.flip(3) if mirror < 5 else images


def to_range(images):
    """uint8 (n, 28, 28) -> float32 (n, 1, 28, 28) in [-1, 1]."""
    return images[:, None] / 127.5 - 1


def train(classifier, images, labels, epochs=10, batch_size=128, rate=2e-3):
    """images: uint8 (n, 28, 28), labels: int64 (n,). Changes the classifier in place."""
    generator = torch.Generator().manual_seed(0)
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    precision = tools.choose_precision(images.device)
    classifier.train().to(memory_format=torch.channels_last)
    for _ in trange(epochs, unit="epoch"):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
            x = augment(to_range(images[chosen]), generator)
            with torch.autocast(x.device.type, precision, enabled=precision is not None):
                loss = F.cross_entropy(classifier(x), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def load(device):
    """Both classifiers, by name, on that device."""
    classifiers, weights = {}, torch.load(PATH, weights_only=True)
    for name in ARCHITECTURES:
        classifiers[name] = Classifier(name)
        classifiers[name].load_state_dict({key: value.float() for key, value in weights[name].items()})
        classifiers[name].eval().requires_grad_(False).to(device)
    return classifiers


@torch.no_grad()
def look(classifier, images, batch_size=500):
    """Features (n, d) and predicted classes (n,) of float32 images (n, 1, 28, 28) in [-1, 1], both on the CPU."""
    device = classifier.classify.weight.device
    batches = tqdm(images.split(batch_size), desc="classifying", leave=False, disable=None)
    features = torch.cat([classifier.features(batch.to(device)) for batch in batches])
    return features.cpu(), classifier.classify(features).argmax(dim=1).cpu()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", metavar="DIR", help="folder with Fashion-MNIST's four files")
    options = parser.parse_args()
    train_set, test_set = (data.load("fashion-mnist", split, options.data_dir) for split in data.SPLITS)
    weights = {}
    for seed, name in enumerate(ARCHITECTURES):
        torch.manual_seed(seed)
        classifier = Classifier(name)
        train(classifier, torch.from_numpy(train_set.images), torch.from_numpy(train_set.labels))
        weights[name] = {
            key: value.half() if value.is_floating_point() else value for key, value in classifier.state_dict().items()
        }
    tools.save_checkpoint(PATH, weights)
    for name, classifier in load("cpu").items():  # rounded to float16, as everyone will use them
        _, found = look(classifier, to_range(torch.from_numpy(test_set.images)))
        right = (found == torch.from_numpy(test_set.labels)).float().mean()
        count = sum(parameter.numel() for parameter in classifier.parameters())
        print(f"{name}: {count:,} parameters, {right:.1%} accurate on the test images")


if __name__ == "__main__":
    tools.run_command(main)
