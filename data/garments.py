"""Synthetic garments, drawn with NumPy, for machines that can't download Fashion-MNIST: same classes and image size.

A garment is a handful of polygons, painted over each other from back to front. Many images of a class are drawn at
once, so whatever differs between them is an array (n,). Positions are in pixels, x from -14 (left) to 14 (right), y
from 0 (top) to 28 (bottom); shades go from 0 (black) to 1 (white).
"""

import numpy as np

SIZE = 28
SPLITS = {"train": 10_000, "test": 2_000}  # images of each, by default
SCANLINES = 4  # per row of pixels
CHUNK = 250  # images drawn at once: few enough to stay in the processor's cache


def draw(split, n=None, seed=0):
    """Images of garments and their labels, balanced and in random order: a function of split, n and seed alone.

    split: "train" or "test", drawn independently. n: how many, at least 1 (default: 10,000 and 2,000).
    Returns images, uint8 (n, 28, 28) with background 0, and labels, int64 (n,), 0 to 9, numbered as in Fashion-MNIST.
    Raises ValueError for any other split, n below 1, or (from NumPy) a negative seed.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: it must be one of {tuple(SPLITS)}")
    n = SPLITS[split] if n is None else n
    if n < 1:
        raise ValueError(f"cannot draw {n} images: n must be at least 1")
    rng = np.random.default_rng([list(SPLITS).index(split), seed])  # each split has its own random numbers
    labels = rng.permutation(np.arange(n) % len(GARMENTS))
    images = np.empty((n, SIZE, SIZE), np.uint8)
    for label, garment in enumerate(GARMENTS):
        places = np.flatnonzero(labels == label)
        for start in range(0, len(places), CHUNK):
            chunk = places[start : start + CHUNK]
            canvas = Canvas(rng, len(chunk))
            garment(canvas)
            images[chunk] = np.rint(255 * canvas.images.clip(0, 1))
    return images, labels


# Polygons and paths are arrays (n, vertices, 2), or (1, vertices, 2) if all images share them.


def points(*pairs):
    """The polygon or path through these (x, y); each coordinate is a number or an array (n,)."""
    coordinates = np.broadcast_arrays(*[coordinate for pair in pairs for coordinate in pair])
    return np.stack(coordinates, axis=-1).reshape(-1, len(pairs), 2)


def arc(x, y, width, height, start=0.0, end=1.0):
    """A path on the ellipse around (x, y), clockwise from the right; start and end are in turns, 0 to 1."""
    angles = 2 * np.pi * np.linspace(start, end, 12)
    return points(*[(x + width / 2 * np.cos(angle), y + height / 2 * np.sin(angle)) for angle in angles])


def mirror(polygon):
    return polygon * (-1, 1)


def whole(half):
    """A symmetric polygon from its right half, which begins and ends on the axis x = 0."""
    return np.concatenate([half, mirror(half)[:, ::-1]], axis=1)


def smooth(polygon):
    """Round a polygon by cutting off its corners at a quarter of each edge (Chaikin 1974)."""
    following = np.roll(polygon, -1, axis=1)
    cuts = np.stack([0.75 * polygon + 0.25 * following, 0.25 * polygon + 0.75 * following], axis=2)
    return cuts.reshape(len(cuts), -1, 2)  # n vertices cuts 2 -> n (vertices cuts) 2


def fill(polygon):
    """How much of each pixel a polygon covers: (n, 28, 28), 0 to 1; here x counts from the left, like y from the top.

    Walk along a scanline from left to right: an edge that goes down takes you inside and one that goes up takes you
    out, or the other way round. So on one scanline, the part of a pixel that is inside is a sum over all crossings: +1
    or -1, times the part of the pixel to the right of the crossing. A pixel's coverage is the mean over its scanlines.
    """
    n, vertices, _ = polygon.shape
    start, end = polygon.reshape(-1, 2), np.roll(polygon, -1, axis=1).reshape(-1, 2)  # of each edge
    # an edge crosses the scanlines y = (line + 1/2) / SCANLINES from `first` up to but excluding `last`
    lines = np.ceil(np.stack([start[:, 1], end[:, 1]]) * SCANLINES - 0.5).clip(0, SIZE * SCANLINES).astype(np.int64)
    first, last = lines.min(axis=0), lines.max(axis=0)
    count = last - first
    run, rise = (end - start).T
    slope = run / np.where(count > 0, rise, 1)
    # from here on, one entry per crossing
    edge = np.repeat(np.arange(n * vertices), count)
    line = np.arange(len(edge)) - np.repeat(np.cumsum(count) - last, count)
    x = (start[edge, 0] + slope[edge] * ((line + 0.5) / SCANLINES - start[edge, 1])).clip(0, SIZE)
    column = x.astype(np.int64)
    sign = np.where(lines[1] > lines[0], 1, -1)[edge] / SCANLINES
    # the crossed pixel gets the part to the right of x, the next one the rest; two extra columns, as x can be SIZE
    place = (edge // vertices * SIZE + line // SCANLINES) * (SIZE + 2) + column
    change = np.bincount(place, sign * (column + 1 - x), n * SIZE * (SIZE + 2))
    change += np.bincount(place + 1, sign * (x - column), n * SIZE * (SIZE + 2))
    coverage = change.reshape(n, SIZE, SIZE + 2).cumsum(axis=-1)[..., :SIZE]
    return np.abs(coverage).clip(0, 1).astype(np.float32)


class Canvas:
    """n images of one class, black at first, and the random numbers that make each one different."""

    def __init__(self, rng, n):
        self.rng, self.n = rng, n
        self.images = np.zeros((n, SIZE, SIZE), np.float32)
        self.pose = np.eye(2) + rng.uniform(-0.03, 0.03, (n, 2, 2))  # a little turned, sheared and scaled ...
        self.shift = SIZE / 2 + rng.uniform(-0.5, 0.5, (n, 1, 2))  # ... and off-centre

    def vary(self, low, high):
        """A random number from `low` to `high` for each image: (n,), for coordinates."""
        return self.rng.uniform(low, high, self.n)

    def tone(self, low, high):
        """Like `vary`, but (n, 1, 1), for shades."""
        return self.vary(low, high).astype(np.float32)[:, None, None]

    def chance(self, probability):
        """Which images get an optional detail: (n,), bool."""
        return self.rng.random(self.n) < probability

    def paint(self, polygon, shade, only=True, inside=1.0):
        """Paint a polygon over what is there. Returns its coverage (n, 28, 28).

        shade: a number, (n, 1, 1) or (n, 28, 28). only: bool (n,), the images to paint on.
        inside: a coverage (n, 28, 28) that the paint stays within.
        """
        placed = (polygon - (0, SIZE / 2)) @ self.pose + self.shift
        coverage = inside * fill(placed * np.reshape(only, (-1, 1, 1)))  # times False: a polygon without area
        self.images += coverage * (shade - self.images)
        return coverage

    def stroke(self, path, width, shade, only=True, inside=1.0):
        """Paint along a path with a pen of this width, a number or (n,)."""
        along = np.gradient(path, axis=1)
        across = along[..., ::-1] * (-1, 1) / np.linalg.norm(along, axis=-1, keepdims=True)
        side = across * np.reshape(width, (-1, 1, 1)) / 2
        self.paint(np.concatenate([path + side, (path - side)[:, ::-1]], axis=1), shade, only, inside)

    def fabric(self, *patterns, patterned):
        """Shades (n, 28, 28) of a material with folds, grain and light from one side, plain or patterned.

        patterns: any of "stripes", "checks", "print" and "fade". patterned: the probability of having one of them.
        """

        def wave(axis, shortest, longest):
            return np.sin(2 * np.pi * axis / self.tone(shortest, longest) + self.tone(0, 7))

        x = np.arange(SIZE, dtype=np.float32) - SIZE / 2
        y = x[:, None]
        noise = self.rng.standard_normal((self.n, SIZE, SIZE), np.float32)
        noise += np.roll(noise, 1, axis=1)
        noise += np.roll(noise, 1, axis=2)
        drawn = {
            "stripes": np.tanh(3 * wave(y, 2.5, 6)),
            "checks": (np.tanh(3 * wave(x, 3.5, 6)) + np.tanh(3 * wave(y, 3.5, 6))) / 2,
            "print": np.tanh(noise),
            "fade": wave(y, 40, 60),
        }
        folds, light = 0.04 * wave(x + self.tone(-0.6, 0.6) * y, 5, 12), self.tone(-0.2, 0.2) * x / SIZE
        shade = self.tone(0.5, 1) * (1 + folds + light + 0.012 * noise)
        kind = np.floor(self.tone(0, len(patterns) / patterned))  # beyond the last pattern: plain
        for number, name in enumerate(patterns):
            shade *= 1 + (kind == number) * self.tone(0.2, 0.65) * (drawn[name] - 1) / 2
        return shade.clip(0.15, 1)


def is_light(fabric):
    """Which images have a fabric so light that a print on it must be dark: (n, 1, 1), bool."""
    return fabric.mean(axis=(1, 2), keepdims=True) > 0.65


# The garments: each function paints one class, from back to front.


def upper_body(canvas, fabric, shoulder, chest, neck, waist, hem, sleeve):
    """Paint two sleeves, and the body between them. Returns the coverage of the body.

    shoulder, chest: half their widths. neck, waist, hem: half the width and the y of each (the neck's y at the front).
    sleeve: length (0 for none), angle away from the body in turns, width at the end.
    """
    top, armpit = 2, 8.5
    (length, angle, cuff), (neck_x, neck_y) = sleeve, neck
    across, down = np.sin(2 * np.pi * angle), np.cos(2 * np.pi * angle)
    end_x, end_y = shoulder - 1.5 + length * across, top + 3 + length * down
    outer_x, outer_y = end_x + cuff / 2 * down, end_y - cuff / 2 * across
    inner_x, inner_y = end_x - cuff / 2 * down, end_y + cuff / 2 * across
    elbow = (shoulder + outer_x) / 2 + 0.5, (top + 1 + outer_y) / 2 - 0.5
    upper_arm = [(chest - 0.3, armpit + 0.5), (chest - 3, armpit), (shoulder - 2, top + 0.3), (shoulder, top + 0.9)]
    arm = points(*upper_arm, elbow, (outer_x, outer_y), (inner_x, inner_y))
    bend = np.where(canvas.chance(0.6), 0.8, 0.5)  # of the neckline: round, or a V
    neckline = [(0, neck_y), (neck_x * bend, top + (neck_y - top) * bend), (neck_x, top - 0.5)]
    side = [(shoulder, top + 1), (chest, armpit), waist, hem, (0, hem[1] + 0.3)]
    body = whole(points(*neckline, *side))
    for polygon in (arm, mirror(arm)):
        covered = canvas.paint(polygon, 0.9 * fabric, length > 0)
        canvas.paint(body * (1.06, 1), 0.5 * fabric, length > 0, covered)  # the seam, and the body's shadow
    canvas.paint(points((-neck_x, top - 0.5), (neck_x, top - 0.5), (0, neck_y + 1)), 0.5 * fabric)  # inside of the back
    return canvas.paint(body, fabric)


def t_shirt(canvas):
    fabric, chest = canvas.fabric("stripes", "print", "fade", patterned=0.4), canvas.vary(6, 7.8)
    neck, waist = (canvas.vary(2.4, 3.8), canvas.vary(3.2, 6)), (chest - canvas.vary(0, 1), 15)
    hem = chest + canvas.vary(-0.4, 1), canvas.vary(23.5, 26.5)
    sleeve = canvas.vary(5, 8), canvas.vary(0.08, 0.13), canvas.vary(3.8, 4.8)
    body = upper_body(canvas, fabric, chest + canvas.vary(0, 0.6), chest, neck, waist, hem, sleeve)
    ink = fabric + canvas.tone(0.3, 0.6) * np.where(is_light(fabric), -1, 1)
    y, emblem = canvas.vary(10, 14), canvas.chance(0.35)
    canvas.paint(arc(0, y, canvas.vary(2, 8), canvas.vary(2, 8)), ink, emblem, body)
    written = ~emblem & canvas.chance(0.5)
    for line in (-2, 0, 2):
        reach = canvas.vary(1, 4.5)
        canvas.stroke(points((-reach, y + line), (reach, y + line)), 1.1, ink, written, body)


def trouser(canvas):
    fabric = canvas.fabric("fade", "checks", "print", patterned=0.35)
    waist, hip, top = canvas.vary(3.4, 4.8), canvas.vary(4.6, 6), canvas.vary(1, 2)
    crotch, stance, ankle = canvas.vary(9, 11.5), canvas.vary(3, 5), canvas.vary(2.2, 4.4)
    bottom = np.where(canvas.chance(0.12), canvas.vary(17, 21), canvas.vary(25.5, 27.2))
    knee = (hip + stance + ankle / 2) / 2 + canvas.vary(-0.5, 0.3), (crotch + bottom) / 2
    leg = [knee, (stance + ankle / 2, bottom), (stance - ankle / 2, bottom + 0.2), (0.4, crotch)]
    legs = canvas.paint(whole(points((0, top + 0.4), (waist, top), (hip, crotch - 3), *leg, (0, crotch))), fabric)
    seam, worn, pockets = fabric * canvas.tone(0.5, 0.8), canvas.chance(0.4), canvas.chance(0.6)
    canvas.stroke(points((0, top), (0, crotch)), 0.7, seam, inside=legs)
    canvas.stroke(points((-6, top + 2), (6, top + 2)), 0.7, seam, canvas.chance(0.6), legs)
    for side in (-1, 1):
        canvas.paint(arc(side * stance, 15, 3, 8), 1.15 * fabric + 0.08, worn, legs)
        canvas.stroke(points((side * 2, top + 2.2), (side * hip, top + 5)), 0.7, seam, pockets, legs)


def pullover(canvas):
    fabric, chest = canvas.fabric("stripes", "stripes", "print", "fade", patterned=0.45), canvas.vary(6, 7.6)
    shoulder, bottom = chest - canvas.vary(0, 0.6), canvas.vary(23.5, 26.5)
    neck_x, neck_y = canvas.vary(2.3, 3.4), canvas.vary(2.8, 6)
    waist, hem = (chest + canvas.vary(-0.5, 0.5), bottom - 4), (chest - canvas.vary(0, 1), bottom)
    sleeve = canvas.vary(17.5, 20.5), canvas.vary(0.03, 0.055), canvas.vary(3.2, 4.4)
    body = upper_body(canvas, fabric, shoulder, chest, (neck_x, neck_y), waist, hem, sleeve)
    ribs = fabric * (canvas.tone(0.5, 0.75) + 0.15 * (np.arange(SIZE) % 2))
    canvas.stroke(points((-9, bottom - 0.8), (9, bottom - 0.8)), 2.6, ribs, inside=body)
    canvas.stroke(points((-neck_x, 1.5), (0, neck_y + 0.5), (neck_x, 1.5)), 1.2, ribs)
    turtleneck = points((-neck_x, 0.4), (neck_x, 0.4), (neck_x + 0.4, 3.4), (-neck_x - 0.4, 3.4))
    canvas.paint(turtleneck, ribs, (neck_y < 4) & canvas.chance(0.6))


def dress(canvas):
    fabric = canvas.fabric("print", "print", "fade", "stripes", patterned=0.55)
    waist, hem = (canvas.vary(3, 4), canvas.vary(10, 13)), (canvas.vary(4.5, 8.5), canvas.vary(25, 27.2))
    neck, sleeveless = (canvas.vary(1.8, 2.8), canvas.vary(3, 7)), canvas.chance(0.5)
    length = np.where(canvas.chance(0.6), canvas.vary(3, 5), canvas.vary(11, 15)) * ~sleeveless
    sleeve = length, canvas.vary(0.05, 0.1), canvas.vary(2.2, 3)
    shoulder, chest = neck[0] + np.where(sleeveless, 0.9, 2), waist[0] + canvas.vary(0.3, 1.1)
    body = upper_body(canvas, fabric, shoulder, chest, neck, waist, hem, sleeve)
    shadow, pleated = fabric * canvas.tone(0.5, 0.85), canvas.chance(0.6)
    for part in (-0.6, -0.1, 0.45):
        canvas.stroke(points((part * waist[0], waist[1]), (part * hem[0], 28)), 0.7, shadow, pleated, body)
    belt = points((-9, waist[1]), (9, waist[1]))
    canvas.stroke(belt, canvas.vary(0.8, 1.8), shadow, canvas.chance(0.6), body)


def coat(canvas):
    fabric, chest = canvas.fabric("checks", "fade", patterned=0.3), canvas.vary(6, 7.4)
    neck, waist = (canvas.vary(2, 2.8), canvas.vary(4, 7)), (chest - canvas.vary(0, 1), 15)
    hem = chest + canvas.vary(-0.3, 2.2), canvas.vary(24, 27.4)
    sleeve = canvas.vary(15.5, 18), canvas.vary(0.03, 0.055), canvas.vary(3.6, 4.6)
    body = upper_body(canvas, fabric, chest, chest, neck, waist, hem, sleeve)
    edge, buttoned, lapel = fabric * canvas.tone(0.3, 0.55), canvas.chance(0.5), neck[1] + canvas.vary(1, 7)
    canvas.stroke(points((0.3, 4), (0.3, 28)), 0.9, edge, inside=body)
    canvas.stroke(points((-9, 14.5), (9, 14.5)), 1.6, edge, canvas.chance(0.25), body)
    pocket, slant = canvas.vary(16.5, 20), canvas.vary(-0.3, 3)
    for side in (-1, 1):
        tips = (side * (neck[0] + 1.8), 5), (side * (neck[0] + 0.8), 6.5)
        collar = points((side * 0.8 * neck[0], 0.8), *tips, (0.3, lapel))
        canvas.stroke(collar, 0.8, edge)
        canvas.paint(collar, 1.12 * fabric)
        canvas.stroke(points((side * 2.6, pocket), (side * 5, pocket + slant)), 0.8, edge, ~buttoned)
        for y in range(14, 25, 3):
            canvas.paint(arc(side * 1.8 + 0.3, y, 1.2, 1.2), edge, buttoned)


def sandal(canvas):
    leather, ground, thick = canvas.fabric("fade", patterned=0.2), canvas.vary(21, 23.5), canvas.vary(1.1, 2.2)
    heel = np.where(canvas.chance(0.5), canvas.vary(4, 10), canvas.vary(0, 1.5))

    def above(x, height):
        """The point this high above the sole, which rises from the ball of the foot to the heel."""
        part = np.clip((x + 5) / 14, 0, 1)
        return x, ground - thick - heel * part**2 * (3 - 2 * part) - height

    ankle, strapped = canvas.vary(7, 9), canvas.chance(0.8)
    toes, instep = [above(-12, -0.5), above(-11, 3), above(-8, 5)], [above(-3, 6.5), above(2, ankle - 1)]
    foot = smooth(points(*toes, *instep, above(5, ankle + 1), above(13, ankle + 1), above(13, -3)))
    foot = canvas.paint(foot, 0)  # invisible, but the straps lie on it
    for middle, wanted in ((-8.3, True), (-3.2, ~strapped | canvas.chance(0.4))):
        x, y = above(middle + canvas.vary(-0.7, 0.7), -1)
        strap = arc(x, y, canvas.vary(5.5, 7.5), canvas.vary(9, 13), 0.5, 1)
        strap[..., 0] += 0.5 * (y[:, None] - strap[..., 1])  # leaning back
        canvas.stroke(strap, canvas.vary(1.4, 2.8), leather, wanted)
    tie = points(above(-9, 3.5), above(-3, 5), above(2, ankle - 2.4), above(5, ankle))
    canvas.stroke(tie, canvas.vary(1.4, 2.6), leather, strapped & canvas.chance(0.4), foot)
    canvas.stroke(points(above(13, -3), above(12.5, 12)), canvas.vary(3, 8), leather, strapped, foot)
    canvas.stroke(points(above(1, ankle - 2), above(13, ankle)), canvas.vary(1.8, 3.2), leather, strapped, foot)
    shade, slim = leather * canvas.tone(0.5, 1.1), canvas.vary(1, 5)
    canvas.stroke(points(*[above(x, -thick / 2) for x in np.linspace(-12.8, 12.5, 12)]), thick, shade)
    canvas.paint(points(above(7.5, -0.5), above(12.5, -0.5), (12.5, ground), (12.5 - slim, ground)), shade, heel > 2)


def shirt(canvas):
    fabric = canvas.fabric("checks", "checks", "print", "stripes", patterned=0.7)
    chest, short, neck_x, neck_y = canvas.vary(5.8, 7.4), canvas.chance(0.4), canvas.vary(2, 2.8), canvas.vary(4, 5.5)
    waist, hem = (chest - canvas.vary(0, 1), 16), (chest + canvas.vary(-0.5, 0.8), canvas.vary(24, 26))
    short_sleeve = canvas.vary(5, 7.5), canvas.vary(0.08, 0.13), canvas.vary(3.6, 4.6)
    long_sleeve = canvas.vary(16, 19), canvas.vary(0.035, 0.065), canvas.vary(2.8, 3.8)
    sleeve = np.where(short, short_sleeve, long_sleeve)
    body = upper_body(canvas, fabric, chest, chest, (neck_x, neck_y), waist, hem, sleeve)
    light, dark = 0.5 * fabric + 0.45, 0.35 * fabric
    canvas.stroke(points((0, neck_y), (0, 28)), 2.6, light, inside=body)
    for y in range(7, 26, 3):
        canvas.paint(arc(0, y + 0.5, 1.3, 1.3), dark, inside=body)
    pocket = points((2.5, 10.5), (2.5, 14), (5.5, 14), (5.5, 10.5), (2.5, 10.5))
    canvas.stroke(pocket, 0.7, dark, canvas.chance(0.4), body)
    for side in (-1, 1):
        tips = (side * (neck_x + 1), 2), (side * (neck_x + 0.4), 6)
        collar = points((side * (neck_x - 1), 1), *tips, (0, neck_y + 0.3))
        canvas.stroke(collar, 0.7, dark)
        canvas.paint(collar, light)


def sneaker(canvas):
    material, ground, thick = canvas.fabric("fade", patterned=0.2), canvas.vary(20.5, 22), canvas.vary(1.6, 3)
    sole, tongue, back = ground - thick, ground - canvas.vary(9, 13), ground - canvas.vary(8, 12.5)
    throat, toe = canvas.vary(-7, -4.5), sole - canvas.vary(3, 4.4)
    front = [(-13, sole + 1), (-13, sole - 1), (-9.5, toe + 0.8), (throat, toe), (0.5, tongue), (2.2, tongue - 0.3)]
    rear = [(5.5, back + 2.2), (9, back + 1.3), (12, back - 0.8), (12.6, sole - 1), (12.6, sole + 1)]
    upper = canvas.paint(smooth(points(*front, *rear)), material)
    dark, light = 0.45 * material, 0.4 * material + 0.55
    accent = np.where(is_light(material) | (canvas.tone(0, 1) < 0.2), dark, light)
    canvas.paint(points((-14, 28), (-14, 0), (-10, 0), (-8, 28)), accent, canvas.chance(0.4), upper)  # toe cap
    canvas.paint(points((8, 28), (9.5, 0), (14, 0), (14, 28)), accent, canvas.chance(0.4), upper)  # heel
    x = canvas.vary(-2, 2)
    stripe = points((x - 2, sole - 3), (x + 0.5, sole - 0.8), (x + 4, sole - 2), (x + 9, sole - 5))
    canvas.stroke(stripe, 1.2, accent, canvas.chance(0.5), upper)
    for part in (0.25, 0.45, 0.65, 0.85):  # laces, from the toes up
        x, y = throat + (0.5 - throat) * part, toe + (tongue - toe) * part
        canvas.stroke(points((x - 0.5, y - 0.7), (x + 1.6, y + 2)), 0.8, accent, inside=upper)
    rubber = np.where(canvas.tone(0, 1) < 0.75, 0.2 * material + 0.75, dark)
    bottom = [(12.8, sole - 0.3), (13, ground - 0.6), (12.5, ground), (-12, ground), (-13.2, ground - 1)]
    canvas.paint(points((-13, sole - 0.3), (0, sole + 0.6), *bottom), rubber)
    canvas.stroke(points((-12, ground), (12.5, ground)), 0.7, 0.3)


def bag(canvas):
    leather = canvas.fabric("fade", "checks", "print", patterned=0.35)
    top, bottom = canvas.vary(9, 15), canvas.vary(23, 26.5)
    upper, lower = canvas.vary(7, 12.5), canvas.vary(7.5, 13)
    strap, width = leather * canvas.tone(0.6, 1), canvas.vary(1, 2)
    handle = arc(0, top + 0.5, 2 * upper * canvas.vary(0.4, 0.85), 2 * (top - 2) * canvas.vary(0.65, 1), 0.5, 1)
    canvas.stroke(handle + np.array([1.2, -0.6]), width, 0.6 * strap, canvas.chance(0.5))
    canvas.stroke(handle, width, strap)
    rim, side = [(0, top), (upper - 0.8, top), (upper, top + 0.8)], (upper + lower) / 2 + canvas.vary(0, 1.2)
    base = [(lower, bottom - 1), (lower - 1, bottom), (0, bottom + 0.3)]
    body = canvas.paint(whole(points(*rim, (side, (top + bottom) / 2), *base)), leather)
    seam, flapped = leather * canvas.tone(0.45, 0.75), canvas.chance(0.4)
    x, y = 0.9 * upper, top + (bottom - top) * canvas.vary(0.35, 0.65)
    canvas.stroke(points((-14, top), (-x, y), (x, y), (14, top)), 0.9, seam, flapped, body)
    canvas.stroke(points((-14, top + 1.5), (14, top + 1.5)), 0.7, seam, ~flapped, body)
    pocket = points((-5, 28), (-5, bottom - 6), (5, bottom - 6), (5, 28))
    canvas.stroke(pocket, 0.8, seam, ~flapped & canvas.chance(0.4), body)
    clasp = arc(0, np.where(flapped, y, top + 3), 2.4, 2)
    canvas.paint(clasp, np.where(is_light(leather), 0.2, 0.95), canvas.chance(0.6))


def ankle_boot(canvas):
    leather, ground, heel = canvas.fabric("fade", patterned=0.25), canvas.vary(25, 26.5), canvas.vary(1.5, 5.5)
    top, front, back = canvas.vary(2, 7), canvas.vary(-1, 2.5), canvas.vary(10.5, 12.5)
    sole, instep, arch = ground - 1.4, ground - canvas.vary(10, 12), ground - heel
    toe = [(-5, sole + 0.5), (-13, sole + 0.5), (-13, sole - 3), (-9.5, sole - 4.8), (-4.5, ground - 9)]
    shaft = [(front - 0.3, instep), *[(front, top)] * 2, *[(back, top + 0.3)] * 2, (back - 0.8, ground - 10)]
    rear = [(12.4, arch - 2), (12, arch + 0.5), (5, arch + 0.5), (-1, sole + 0.5)]
    boot = canvas.paint(smooth(points(*toe, *shaft, *rear)), leather)
    dark, slim = leather * canvas.tone(0.35, 0.7), canvas.vary(4, 7)
    tread = [(-13, sole), (0, sole - 0.2), (6, arch - 0.2), (12.2, arch - 0.2)]
    block = [(11.7, ground), (12 - slim, ground), (5.5, arch + 0.8), (0, ground), (-11.7, ground)]
    canvas.paint(points(*tread, *block), np.where(canvas.tone(0, 1) < 0.7, dark, 0.3 * leather + 0.6))
    canvas.stroke(points((-5, sole - 7), (-3, sole - 3), (2, sole)), 0.7, dark, canvas.chance(0.5), boot)
    canvas.stroke(points((-14, top + 1.5), (14, top + 1.5)), 0.8, dark, canvas.chance(0.6), boot)
    laced = canvas.chance(0.45)
    for y in top + 3 + 2.2 * np.arange(5)[:, None]:
        x = front - 0.9 * np.maximum(y - instep, 0)
        canvas.stroke(points((x - 1, y - 0.5), (x + 2.8, y + 0.6)), 0.8, dark, laced, boot)
    x = (front + back) / 2
    elastic = points((front + 3.5, top + 1.5), (back - 2.5, top + 1.5), (x + 1.2, top + 9), (x - 0.2, top + 9))
    canvas.paint(elastic, dark, ~laced & canvas.chance(0.6), boot)


GARMENTS = (t_shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle_boot)
