"""The judges: two small classifiers of garments, whose features measure how good drawn garments are.

Distances between sets of images are taken between a judge's pooled features (Heusel et al. 2017, with this network in
the place of Inception, which was made for photographs). They depend on the judge: what both say can be relied on. Each
is trained once, on the official training images, in about ten minutes on two CPU cores, and kept under runs/judge/.
"""

import pickle
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm, trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lesson_tools as tools

FEATURES = 256  # what both architectures end with
KEPT = tools.RUNS / "judge"


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


def residual():
    """Five residual blocks, 32 to 256 channels (after He et al. 2015)."""
    shapes = (32, 32, 1), (32, 64, 2), (64, 128, 2), (128, 256, 2), (256, 256, 1)
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), *(Block(*shape) for shape in shapes))


def plain():
    """Six convolutions, 32 to 256 channels, maxima, no shortcuts (after Simonyan and Zisserman 2014, "VGG")."""

    def layer(in_channels, out_channels):
        convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())

    halve = nn.MaxPool2d(2)
    large, middle = (layer(1, 32), layer(32, 32)), (layer(32, 64), layer(64, 64))
    return nn.Sequential(*large, halve, *middle, halve, layer(64, 128), layer(128, 256))


ARCHITECTURES = {"residual": residual, "plain": plain}


class Judge(nn.Module):
    """256 pooled features of one of the two architectures, and ten classes."""

    def __init__(self, name, n_classes=10):
        super().__init__()
        self.blocks = ARCHITECTURES[name]()
        self.classify = nn.Linear(FEATURES, n_classes)

    def features(self, x):
        """x: float32 (n, 1, 28, 28) in [-1, 1]. Returns (n, 256)."""
        return self.blocks(x).mean(dim=(2, 3))

    def forward(self, x):
        return self.classify(self.features(x))


def augment(images, generator):
    """Shift a batch `(n, 1, 28, 28)` by up to two pixels, and mirror it half of the time."""
    dy, dx, mirror = torch.randint(0, 10, (3,), generator=generator).tolist()
    images = F.pad(images, (2, 2, 2, 2), value=-1)[..., dy % 5 : dy % 5 + 28, dx % 5 : dx % 5 + 28]
    return images.flip(3) if mirror < 5 else images


def to_range(images):
    """uint8 (n, 28, 28) -> float32 (n, 1, 28, 28) in [-1, 1]."""
    return images[:, None] / 127.5 - 1


def train(judge, name, images, labels, epochs=10, batch_size=128, rate=2e-3, seed=0):
    """images: uint8 (n, 28, 28), labels: int64 (n,), both tensors where the judge is. It is changed in place."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(judge.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    precision = tools.choose_precision(images.device)  # bfloat16 without instructions for it takes ten times as long
    judge.train().to(memory_format=torch.channels_last)
    for _ in trange(epochs, desc=f"training the judge {name!r}", unit="epoch"):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for chosen in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
            x = augment(to_range(images[chosen]), generator)
            with torch.autocast(x.device.type, precision, enabled=precision is not None):
                loss = F.cross_entropy(judge(x), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def get_judge(name, images, labels):
    """The judge of that name that is kept under runs/; if there is none, one is trained on these images and kept.

    images and labels as for `train`; the judge goes to their device. Raises UserError if the file is broken, or can't
    be written.
    """
    path, seed = KEPT / f"{name}.pt", list(ARCHITECTURES).index(name)
    torch.manual_seed(seed)
    judge = Judge(name).to(images.device)
    if path.exists():
        try:
            judge.load_state_dict(torch.load(path, map_location=images.device, weights_only=True))
        except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
            message = f"{path}: damaged, or of another version; delete it, and one is trained anew"
            raise tools.UserError(message) from error
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            train(judge, name, images, labels, seed=seed)
            tools.save_checkpoint(path, judge.state_dict())
        except OSError as error:
            message = f"{path}: can't be written, but a judge is trained only once ({error})"
            raise tools.UserError(message) from error
    return judge.eval()


@torch.no_grad()
def look(judge, images, batch_size=500):
    """Features (n, 256) and class (n,) of float32 images (n, 1, 28, 28) in [-1, 1], both on the CPU."""
    device = judge.classify.weight.device
    batches = tqdm(images.split(batch_size), desc="judging", leave=False, disable=None)
    features = torch.cat([judge.features(batch.to(device)) for batch in batches])
    return features.cpu(), judge.classify(features).argmax(dim=1).cpu()
