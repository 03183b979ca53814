"""The data sets: Fashion-MNIST, garments that are drawn here and need no download, and your own pictures."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import fashion_mnist, garments, pictures
from data.fashion_mnist import DataError

__all__ = ["NAMES", "SPLITS", "DataError", "Dataset", "load"]

NAMES = ("auto", "fashion-mnist", "garments")
SPLITS = ("train", "test")


class Dataset(NamedTuple):
    images: np.ndarray  # uint8 (n, height, width), 0 is background
    labels: np.ndarray  # int64 (n,)
    classes: tuple[str, ...]  # the name of each label
    name: str  # what pictures and checkpoints call the data set


def load(name="auto", split="train", data_dir=None, download=True):
    """A whole data set in memory, as a `Dataset`.

    name: "fashion-mnist" (or what lies in its place: other files in its format, see `data/fashion_mnist.py` for where
        they are looked for, or pictures), "garments" (drawn here), or "auto": the first, and garments where it can't be
        had.
    split: "train" or "test".
    data_dir: the folder with the four IDX files, or with a folder of pictures for each class; None is
        `$FASHION_MNIST_DIR`, if that is set. Garments need none.
    download: whether Fashion-MNIST may be downloaded; if not, "auto" takes it only where it lies on the disk.

    Raises DataError, with one line to show the user, for damaged or missing files; ValueError for an unknown name.
    """
    if name not in NAMES or split not in SPLITS:
        raise ValueError(f"no data set {name!r}, {split!r}: name is one of {NAMES}, split one of {SPLITS}")
    if name == "garments" and data_dir is not None:
        raise DataError("--data garments are drawn, not read: leave --data-dir out")
    if name != "garments":
        folder = data_dir or os.environ.get("FASHION_MNIST_DIR")
        is_idx = not folder or fashion_mnist.find(Path(folder), fashion_mnist.FILES[split][0])
        if not is_idx and (classes := pictures.find(folder)):
            return Dataset(*pictures.load(split, folder, classes))
        try:
            return Dataset(*fashion_mnist.load(split, folder, download))
        except fashion_mnist.DownloadError as error:
            if name == "fashion-mnist":
                raise
            if download:
                print(f"{error}: drawn garments take its place")
    return Dataset(*garments.draw(split), fashion_mnist.CLASSES, "garments")
