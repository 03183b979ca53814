"""Your own pictures: a folder with a folder of PNG or JPEG files for each class (as torchvision's ImageFolder)."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.fashion_mnist import DataError

SIZE = 28


def find(folder):
    """The pictures of each class, by its name: `{folder's name: [paths]}`, in alphabetical order; {} if there are none.

    Raises DataError where one class has pictures and another has none.
    """
    classes = {path.name: sorted(path.iterdir()) for path in sorted(Path(folder).glob("[!.]*/"))}
    for name, paths in classes.items():
        classes[name] = [path for path in paths if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if any(classes.values()) and not all(classes.values()):
        empty = next(name for name, paths in classes.items() if not paths)
        raise DataError(f"{Path(folder) / empty}: no PNG or JPEG file; each class's folder must hold some")
    return classes if any(classes.values()) else {}


def load(split, folder):
    """Images, labels, class names and the folder's name. The images are grey, and fitted to 28 × 28 pixels with black.

    The test split is every tenth picture of a class; where no class has ten, the last one of the largest. (A single
    picture is both splits.) Raises DataError where a file can't be read.
    """
    classes = find(folder)
    tenth = {path for paths in classes.values() for path in paths[9::10]} or {max(classes.values(), key=len)[-1]}
    pictures = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    chosen = [pair for pair in pictures if (pair[0] in tenth) == (split == "test")] or pictures
    images, coloured = zip(*(read(path) for path, _ in chosen), strict=True)
    name = Path(folder).resolve().name
    if any(coloured):
        print(f"{name}, {split}: {sum(coloured):,} of {len(chosen):,} pictures have colours, and are made grey")
    return np.stack(images), np.array([label for _, label in chosen]), tuple(classes), name


def read(path):
    """A picture as uint8 `(28, 28)`, what is transparent being black; and whether it had colours."""
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: can't be read as a picture ({error})") from error
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("RGB")
    pixels = np.asarray(flat)
    grey = ImageOps.pad(flat.convert("L"), (SIZE, SIZE))
    return np.asarray(grey), bool((pixels != pixels[..., :1]).any())
