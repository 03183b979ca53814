"""The data sets: Fashion-MNIST, synthetic garments (no download needed), and your own images."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import fashion_mnist, garments, pictures
from data.fashion_mnist import DataError

__all__ = ["NAMES", "SPLITS", "DataError", "Dataset", "expand", "load"]

NAMES = ("auto", "fashion-mnist", "garments")
SPLITS = ("train", "test")


class Dataset(NamedTuple):
    """One split of a data set."""

    images: np.ndarray  # uint8 `(n, height, width)`, with background 0
    labels: np.ndarray  # int64 `(n,)`
    classes: tuple[str, ...]  # the name of each label
    name: str  # of the data set, for titles and checkpoints


def load(name="auto", split="train", data_dir=None, download=True):
    """A split of a data set, as a `Dataset`.

    name: "fashion-mnist" (or your own data in `data_dir`), "garments" (synthetic), or "auto": Fashion-MNIST or your
        data, but garments if Fashion-MNIST is unavailable.
    split: "train" or "test".
    data_dir: a folder with the four IDX files, or with one subfolder of images per class; None means
        `$FASHION_MNIST_DIR`, if it is set. Must be None for garments.
    download: whether Fashion-MNIST may be downloaded; if not, "auto" uses it only if it is already on disk.

    Raises DataError, with a one-line message for the user, if files are missing or damaged; ValueError for an unknown
    name or split.
    """
    if name not in NAMES or split not in SPLITS:
        raise ValueError(f"no data set {name!r}, {split!r}: name is one of {NAMES}, split one of {SPLITS}")
    if name == "garments" and data_dir is not None:
        raise DataError("--data garments reads no files: leave --data-dir out")
    if data_dir == "":
        raise DataError("--data-dir is empty (an unset variable?): name a folder, or leave --data-dir out")
    named = os.environ.get("FASHION_MNIST_DIR") if data_dir is None else data_dir
    if name != "garments":
        folder = descend(expand(named)) if named else None
        title = printable(Path(named or fashion_mnist.CACHES[0]).resolve().name)
        if folder and not fashion_mnist.is_in(folder):
            images, labels, classes = pictures.load(split, folder)
            return Dataset(images, labels, tuple(map(printable, classes)), title)
        try:
            images, labels, classes, official = fashion_mnist.load(split, folder, download)
            return Dataset(images, labels, classes, official or title)
        except fashion_mnist.DownloadError as error:
            if name == "fashion-mnist":
                raise
            if download:
                print(f"{error}; using synthetic garments instead")
    images, labels = garments.draw(split)
    return Dataset(images, labels, fashion_mnist.CLASSES, "garments")


def printable(text):
    """The text, with a question mark for each byte that isn't UTF-8."""
    return text.encode(errors="replace").decode()


def expand(text):
    """A path that may begin with `~`. Raises DataError if it names an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"{text}: {error}") from error


def descend(folder):
    """Go down while a folder holds one folder and no data; return the last. Raises DataError if `folder` isn't one."""
    if not folder.is_dir():
        raise DataError(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")
    folders, files = pictures.look(folder)
    return folder if fashion_mnist.is_in(folder) or files or len(folders) != 1 else descend(*folders)
