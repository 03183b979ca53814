"""The data sets: Fashion-MNIST, garments that are drawn here and need no download, and your own pictures."""

import functools
import os
from pathlib import Path

from data import fashion_mnist, garments, pictures
from data.fashion_mnist import DataError

__all__ = ["NAMES", "SPLITS", "DataError", "Dataset", "load"]

NAMES = ("auto", "fashion-mnist", "garments")
SPLITS = ("train", "test")


class Dataset:
    """A split of a data set: images, uint8 `(n, height, width)`, 0 is background; labels, int64 `(n,)`; classes, the
    name of each label; and the data set's name, for pictures and checkpoints."""

    def __init__(self, read_images, labels, classes, name):
        self.read_images, self.labels, self.classes, self.name = read_images, labels, classes, name

    @functools.cached_property
    def images(self):
        return self.read_images()


def load(name="auto", split="train", data_dir=None, download=True):
    """A split of a data set, as a `Dataset`. Your own pictures are read when its images are first asked for.

    name: "fashion-mnist" (or your own data in `data_dir`), "garments" (drawn here), or "auto": the first, and garments
        if it is unavailable.
    split: "train" or "test".
    data_dir: the folder with the four IDX files, or with a folder of pictures for each class; None is
        `$FASHION_MNIST_DIR`, if that is set. Garments need none.
    download: whether Fashion-MNIST may be downloaded; if not, "auto" takes it only if it is on the disk.

    Raises DataError, with one line to show the user, for damaged or missing files (pictures: when they are read);
    ValueError for an unknown name.
    """
    if name not in NAMES or split not in SPLITS:
        raise ValueError(f"no data set {name!r}, {split!r}: name is one of {NAMES}, split one of {SPLITS}")
    if name == "garments" and data_dir is not None:
        raise DataError("--data garments are drawn, not read: leave --data-dir out")
    if data_dir == "":
        raise DataError("--data-dir is empty (a variable that isn't set?): name a folder, or leave --data-dir out")
    named = os.environ.get("FASHION_MNIST_DIR") if data_dir is None else data_dir
    if name != "garments":
        folder = descend(Path(named)) if named else None
        if folder and not fashion_mnist.is_in(folder):
            return Dataset(*pictures.load(split, folder), Path(named).resolve().name)
        try:
            images, labels, classes, official = fashion_mnist.load(split, folder, download)
            return Dataset(lambda: images, labels, classes, official or Path(named).resolve().name)
        except fashion_mnist.DownloadError as error:
            if name == "fashion-mnist":
                raise
            if download:
                print(f"{error}: drawn garments take its place")
    images, labels = garments.draw(split)
    return Dataset(lambda: images, labels, fashion_mnist.CLASSES, "garments")


def descend(folder):
    """The folder or, while one holds nothing but another, the innermost one. Raises DataError if there is none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")
    folders, files = pictures.look(folder)
    return folder if fashion_mnist.is_in(folder) or files or len(folders) != 1 else descend(*folders)
