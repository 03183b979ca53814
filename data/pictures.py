"""Your own pictures: a folder with a folder of PNG or JPEG files for each class (as torchvision's ImageFolder).

Pillow reads them, on which matplotlib depends.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.fashion_mnist import DataError

SIZE = 28


def find(folder):
    """The pictures of each class, by its name: `{folder's name: [paths]}`, in alphabetical order; {} if there are none.

    Raises DataError where one class has pictures and another has none.
    """
    classes = {}
    for path in sorted(Path(folder).glob("[!.]*/")):
        files = sorted(path.glob("[!.]*"))
        classes[path.name] = [file for file in files if file.suffix.lower() in (".png", ".jpg", ".jpeg")]
    empty = [name for name, paths in classes.items() if not paths]
    if len(empty) == len(classes):
        return {}
    if empty:
        raise DataError(f"{Path(folder) / empty[0]}: no PNG or JPEG file; each class's folder must hold some")
    return classes


def load(split, folder, classes):
    """Images, labels, class names and the folder's name. The images are grey, and fitted to 28 × 28 pixels with black.

    classes: what `find` found. The test split is every tenth picture of a class; where no class has ten, the last one
    of the largest; and if none has even two, both splits are all. Raises DataError where a file can't be read.
    """
    pictures = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    largest = max(classes.values(), key=len)
    held_out = {path for paths in classes.values() for path in paths[9::10]}
    if not held_out and len(largest) > 1:
        held_out = {largest[-1]}
    chosen = [pair for pair in pictures if (pair[0] in held_out) == (split == "test")] or pictures
    images, coloured = zip(*(read(path) for path, _ in chosen), strict=True)
    name = Path(folder).resolve().name
    if any(coloured):
        print(f"{name}, {split}: {sum(coloured):,} of {len(chosen):,} pictures have colours, and are made grey")
    return np.stack(images), np.array([label for _, label in chosen]), tuple(classes), name


def read(path):
    """A picture as uint8 `(28, 28)`, what is transparent being black; and whether it had colours."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a pixel, which conversion would cut off at 255
                upright = Image.fromarray((np.asarray(upright) / 257).astype(np.uint8))
            picture = ImageOps.pad(upright.convert("RGBA"), (SIZE, SIZE))
    except Exception as error:  # of many kinds: whatever reading strange bytes can lead to
        raise DataError(f"{path}: can't be read as a picture ({error})") from error
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("RGB")
    pixels = np.asarray(flat)
    return np.asarray(flat.convert("L")), bool((pixels != pixels[..., :1]).any())
