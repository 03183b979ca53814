"""Your own images: a folder with one subfolder per class (as for torchvision's ImageFolder).

Pillow reads them; matplotlib already depends on it.
"""

import functools
from collections import Counter

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from data.fashion_mnist import FILES, DataError

SIZE = 28
STUBS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow knows their names, but can't read them by itself
SUFFIXES = {
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in STUBS
}
TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")  # the splits' folder names


def look(folder):
    """A folder's subfolders, and its files that Pillow can read, both sorted, without hidden ones."""
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__MACOSX"))]
    return [path for path in paths if path.is_dir()], [path for path in paths if path.suffix.lower() in SUFFIXES]


def find(folder):
    """The training images and the test images, each as `{class: [paths]}`.

    If there are folders with names from TRAIN and from TEST, and no others, the first of each are the splits. Otherwise
    every tenth image of a class is held out for testing. If no class has ten, the largest class gives up its last one;
    if none has even two, both splits contain everything.
    """
    folders = {path.name.lower(): path for path in look(folder)[0]}
    train, test = ([folders[name] for name in names if name in folders] for names in (TRAIN, TEST))
    if train and test and folders.keys() <= {*TRAIN, *TEST}:
        return find_classes(train[0], folder.name), find_classes(test[0], folder.name)
    classes = find_classes(folder, folder.name)
    largest = max(classes.values(), key=len)
    last = largest[-1:] if len(largest) > 1 else []
    held_out = {path for paths in classes.values() for path in paths[9::10]} or {*last}
    splits = [{name: [] for name in classes} for _ in range(2)]
    for name, paths in classes.items():
        for path in paths:
            splits[path in held_out][name].append(path)
    return splits if held_out else (classes, classes)


def find_classes(folder, name):
    """Each class's images, by the name of its folder; if no subfolder holds any, all are one class, `name`."""
    folders, pictures = look(folder)
    classes = {path.name: look(path)[1] for path in folders}
    if not any(classes.values()):
        classes = {name: pictures}
    if not any(classes.values()):
        files = ", ".join(name for names in FILES.values() for name in names)
        there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        contents = ", ".join(there[:5]) or "no files"
        raise DataError(f"{folder}: needs one subfolder of images per class, or {files}; it contains {contents}")
    if empty := [name for name in classes if not classes[name]]:
        raise DataError(f"{folder / empty[0]}: no readable image; each class folder needs at least one")
    return classes


def load(split, folder):
    """Images (uint8 `(n, 28, 28)`), labels (int64 `(n,)`) and class names. Converts the images to greyscale, fits them
    to 28 × 28 on black, and prints what it skipped or lost. Raises DataError."""
    splits = train, test = find(folder)
    classes, chosen = tuple(train), train if split == "train" else test
    if unknown := [name for name in test if name not in train]:
        which = "without a class folder" if unknown == [folder.name] else f"of class {unknown[0]}"
        advice = "to use the training images alone, pass their folder"
        raise DataError(f"{folder}: test images {which}, but no such training images; {advice}")
    paths = sorted({path for each in splits for paths in each.values() for path in paths})
    found = read_all(folder, tuple((path, path.exists() and path.stat().st_mtime_ns) for path in paths))
    images = np.stack([found[path] for paths in chosen.values() for path in paths])
    return images, np.array([classes.index(name) for name in chosen for _ in chosen[name]]), classes


@functools.lru_cache(maxsize=1)
def read_all(folder, files):
    """The images of both splits, by path. files: (path, time of last change) of each."""
    images, coloured, grey, troubles = {}, 0, [], []
    for path, _ in tqdm(files, "reading images", leave=False, disable=None):
        try:
            images[path], has_colours = read(path)
            coloured += has_colours
            if np.ptp(images[path]) < 16:
                grey.append(path.name)
        except DataError as error:
            troubles.append(str(error))
    if troubles:
        raise DataError("; ".join(troubles[:10]) + f"; and {len(troubles) - 10:,} more" * (len(troubles) > 10))
    files = [path for path in folder.rglob("*") if "/." not in f"/{path.relative_to(folder).as_posix()}"]
    others = Counter(path.suffix or "no suffix" for path in files if path.is_file() and path not in images)
    for count, what in (
        (others.total(), f"other files skipped ({', '.join(sorted(others))})"),
        (coloured, f"of {len(images):,} images converted from colour to greyscale"),
        (len(grey), f"of {len(images):,} images come out almost uniformly grey, such as {', '.join(grey[:1])}"),
    ):
        if count:
            print(f"{folder.name}: {count:,} {what}")
    return images


def read(path):
    """An image as uint8 `(28, 28)`, black where it was transparent; and whether it was in colour."""
    try:
        with Image.open(path) as image:
            image.draft(None, (4 * SIZE, 4 * SIZE))  # a large JPEG is read at a fraction of its size
            upright = ImageOps.exif_transpose(image)
            if upright.mode[0] in "IF":  # more than 8 bits per pixel; convert() would clip them at 255
                values = np.asarray(upright)
                if not ((values >= 0) & (values <= 65535) & (values == values.round())).all():
                    raise ValueError("its values are not whole numbers from 0 to 65,535; save it with 8 or 16 bits")
                upright = Image.fromarray((values / 257).astype(np.uint8))
            picture = ImageOps.pad(upright.convert("RGBA"), (SIZE, SIZE))
    except Exception as error:  # of any kind: arbitrary bytes can fail anywhere
        raise DataError(f"{path}: can't be read as an image ({error})") from error
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("RGB")
    pixels = np.asarray(flat)
    return np.asarray(flat.convert("L")), bool((pixels != pixels[..., :1]).any())
