"""The plumbing of the lessons: cells, figures, files, devices, checkpoints, a resumable training run, options.

Nothing here is part of the lecture, and you can follow every lesson without reading it.
"""

import argparse
import contextlib
import functools
import io
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data

RUNS = Path(__file__).resolve().parent / "runs"  # a folder for each script
if not hasattr(sys, "ps1"):  # a script needs no display; in a notebook, its own backend draws
    plt.switch_backend("agg")
plt.rcdefaults()  # a matplotlibrc may draw images upside down
plt.rcParams.update({"figure.constrained_layout.use": True, "savefig.dpi": 120})
plt.rcParams.update({"image.cmap": "gray", "image.interpolation": "nearest"})
plt.rcParams["text.parse_math"] = False  # a class may be called "$5 to $10"


class UserError(Exception):
    """Something the user can fix; the message is one line that says how."""


# %% Cells, sections, commands
def is_cell(function):
    """Whether a function was defined in a cell, that is, at a prompt or in a notebook. Both set `sys.ps1`.

    IPython's `%run script.py` doesn't count: `sys.ps1` is set there too, but the code's file is `sys.argv[0]`.
    """
    return hasattr(sys, "ps1") and Path(function.__code__.co_filename).resolve() != Path(sys.argv[0]).resolve()


def section(show):
    """Mark a section's function. In a cell it runs at once, so its picture appears below the cell; in a script,
    `run_sections` runs it."""
    if show.__module__ == "__main__" and is_cell(show):
        show()
    return show


def run_sections(script, out):
    """Run a script's show_ functions, each under its section's title, and save their pictures in the folder `out`.
    script: its `globals()`."""
    out.mkdir(parents=True, exist_ok=True)
    lines = Path(script["__file__"]).read_text(encoding="utf-8").splitlines()
    for name, show in list(script.items()):
        if name.startswith("show_"):
            above = reversed(lines[: show.__code__.co_firstlineno])
            title = next(line for line in above if line.startswith("# %%")).removeprefix("# %% ")
            print(f"\n{title}")
            if figure := show():
                number = int(title.partition(".")[0])
                save_picture(out / f"{number:02}_{name.removeprefix('show_')}.png", lambda: figure)


def run_command(main):
    """Run a script's `main`, except in a cell. An error the user can fix becomes one line, and exit status 2."""
    if is_cell(main):
        return
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # IPython's streams have no such method
            stream.reconfigure(errors="replace")  # at worst, "×" becomes a question mark, whatever the encoding
    try:
        with mock.patch.dict(os.environ):  # forget what the command sets there: `%run` shares the notebook's process
            main()
        return
    except (UserError, data.DataError, OSError) as error:
        message, status = error, 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(r"out of memory|enough memory|can't allocate", str(error)):
            raise
        message, status = "out of memory; try a smaller --batch-size or, when sampling, a smaller --n", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


# %% Figures
def set_title(figure, title):
    """A title above the figure; its second line, if it has one, is smaller."""
    first, newline, second = title.partition("\n")
    above = figure.suptitle(first + newline)
    figure.axes[0].annotate(second, (0.5, 0), xycoords=above, ha="center", va="bottom", color="0.3", in_layout=False)


def plot_lines(axes, x, lines, **labels):
    """Plot up to three named curves over x, distinguishable without colour; if x has few points, they get markers and
    ticks. labels: whatever `axes.set` takes."""
    for (name, y), color, line in zip(lines.items(), ("black", "tab:orange", "0.5"), ("-", "--", "-."), strict=False):
        axes.plot(x, y, line, color=color, marker="o" if len(x) < 25 else None, label=name)
    axes.set(**labels)
    axes.legend()
    if len(x) < 12:
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":  # the default labels, 10^{-1}, need math text, which is off
            axis.set(major_formatter="{x:g}", minor_formatter="")


def plot_curves(title, x, lines, **labels):
    """A figure with the curves of `plot_lines`."""
    figure, axes = plt.subplots(figsize=(8, 3.8))
    plot_lines(axes, x, lines, **labels)
    set_title(figure, title)
    return figure


def plot_image(axes, image, title, **options):
    """An image `(h, w)` under its title."""
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[], yticks=[])
    axes.imshow(image.numpy(), **options)


def plot_matrix(axes, matrix, title, rows=(), columns=(), cmap="Greys", digits=0):
    """Draw a matrix as a table of numbers; larger ones get a darker background. rows, columns: their names."""
    axes.imshow(matrix.numpy(), cmap=cmap, vmin=0, vmax=2 * max(1e-6, matrix.max().item()), aspect="auto")
    for (row, column), value in np.ndenumerate(matrix.numpy()):
        axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=12)
    axes.set_title(title, fontsize=11)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def plot_images(axes, images, columns, rows=(), titles=()):
    """Draw images `(n, 1, h, w)`, from -1 to 1, as a grid, row by row; rows and titles name its rows and columns."""
    _, _, height, width = images.shape
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns), value=-1)  # fill the grid with background
    grid = rearrange(images, "(rows columns) 1 h w -> (rows h) (columns w)", columns=columns)
    axes.imshow(grid.numpy(), vmin=-1, vmax=1)
    titles, rows = ([f"{name:.40}" for name in names] for names in (titles, rows))
    axes.set_xticks([(column + 0.5) * width - 0.5 for column in range(len(titles))], titles)
    axes.set_yticks([(row + 0.5) * height - 0.5 for row in range(len(rows))], rows)
    axes.xaxis.tick_top()
    axes.vlines(torch.arange(1, columns) * width - 0.5, -0.5, len(grid) - 0.5, color="0.4", linewidth=0.5)
    axes.hlines(torch.arange(height, len(grid), height) - 0.5, -0.5, grid.shape[1] - 0.5, color="0.4", linewidth=0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def plot_grid(title, images, columns, rows=(), titles=()):
    """A figure with the grid of `plot_images`."""
    scale = min(1.4, min(12, max(4, 0.8 * columns)) / columns)  # inches per image
    width, height = scale * columns + 1.5 * bool(rows), scale * math.ceil(len(images) / columns) + 0.6
    figure, axes = plt.subplots(figsize=(max(8, width), height + 0.3 * bool(titles)), layout="compressed")
    plot_images(axes, images, columns, rows, titles)
    set_title(figure, title)
    return figure


def plot_losses(title, losses, previews):
    """A figure of the loss at each step so far `(n,)`, its running mean, and the previews' losses."""
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(losses, color="0.8", linewidth=0.7)
    axes.plot(range(window - 1, len(losses)), smooth, color="black", label="batches (running mean)")
    steps, _, measured = zip(*previews, strict=True)
    for name, line in zip(measured[0] | measured[-1], ("--", "-"), strict=False):
        values = [each.get(name, math.nan) for each in measured]
        axes.plot(steps, values, line, color="tab:orange", marker="o", markersize=4, label=f"averaged weights, {name}")
    top = max(2.5 * np.median(losses), 1.5 * max(measured[-1].values()))
    axes.set(xlabel="step", ylabel="loss", ylim=(0, top))
    axes.legend(loc="upper right")
    set_title(figure, title)
    return figure


# %% Files
def write_atomically(path, save):
    """Let save(buffer) produce a file's content, then write it, all or nothing, creating its folder if necessary: the
    old file stays until the new one is complete. Raises OSError, with path and reason, if it can't be written."""
    buffer = io.BytesIO()
    save(buffer)
    try:
        data.fashion_mnist.keep(buffer.getvalue(), path)
    except OSError as error:
        raise OSError(f"{path}: can't be written ({error.strerror})") from error


def save_picture(path, plot, *arguments, quiet=False):
    """Write the figure that plot(*arguments) returns, and say so. A failure only prints a line: no result is lost."""
    try:
        figure = plot(*arguments)
        plt.close(figure)  # a closed figure can still be saved
        write_atomically(path, functools.partial(figure.savefig, format="png"))
        if not quiet:
            tqdm.write(f"wrote {path}")
    except Exception as error:  # of any kind: a picture isn't worth losing a run over
        tqdm.write(f"{path}: not written ({error})")


def writable_folder(text):
    """For argparse: a writable folder, or one that can be created. Better to fail now than after training."""
    folder = data.expand(text)
    try:
        if not text:
            raise OSError("its name is empty")
        there = next((each for each in (folder, *folder.parents) if each.exists() or each.is_symlink()), folder)
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a writable folder ({error})") from error
    return folder


# %% Images for the sections
load_data = functools.cache(data.load)


def load_images(split, n):
    """The first n images of Fashion-MNIST, or of the data used instead, and the data set's name.

    split: "train" or "test". The images are float32 `(n, 1, 28, 28)` in [-1, 1].
    """
    found = load_data(split=split)
    return F.interpolate(torch.from_numpy(found.images[:n])[:, None] / 127.5 - 1, size=(28, 28)), found.name


def load_one_of_each():
    """One test image of each class, `(classes, 1, 28, 28)` in [-1, 1], the classes' names, and the data set's name.

    It downloads nothing: if Fashion-MNIST isn't on disk, the images are synthetic garments.
    """
    test = load_data(split="test", download=False)
    labels, firsts = np.unique(test.labels, return_index=True)
    images = torch.from_numpy(test.images[firsts])[:, None] / 127.5 - 1  # n 1 h w
    return F.interpolate(images, size=(28, 28)), [test.classes[label] for label in labels], test.name


# %% Devices and processes
# torchrun starts a script several times. Each process takes its share of every batch and updates its weights with the
# mean of all gradients (DistributedDataParallel), so the weights stay in sync. Only the first prints and writes files.
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun; WORLD_SIZE may also come from a cluster's scheduler
PROCESSES, RANK = (int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])) if LAUNCHED else (1, 0)


def choose_device(name):
    """The torch.device for --device; "auto" is an NVIDIA GPU if there is one, otherwise the CPU. Raises UserError if
    there is no such device."""
    mps = torch.backends.mps.is_available() and PROCESSES == 1  # DistributedDataParallel can't use it
    try:  # the GPU, or its driver, may be too old for this PyTorch
        cuda = torch.cuda.is_available() and bool(torch.ones(1, device="cuda").sum() == 1)
    except RuntimeError:
        cuda = False
    there = {"cuda": cuda, "cpu": True, "mps": mps}
    if name == "auto" and not cuda and shutil.which("nvidia-smi"):
        print("note      this PyTorch can't use the NVIDIA GPU, so we use the CPU; pytorch.org has other builds")
    available = [device for device in there if there[device]]
    if name not in ("auto", *available):
        raise UserError(f"--device {name}: not available here; use {' or '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def choose_precision(device):
    """bfloat16 if the CPU or NVIDIA GPU has instructions for it (emulation is slow), otherwise None.

    PyTorch before 2.11 can't tell what a CPU supports; for a CPU, the answer is then None.
    """
    instructions = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device.type == "cpu" and (instructions.get("amx_bf16") or instructions.get("avx512_bf16"))
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else None


def join_processes(device, found):
    """Join the other processes, if there are any. found: what all of them must agree on. Raises UserError if they
    don't, or if there are too few GPUs."""
    if PROCESSES == 1:
        return
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()  # on this machine
        if local >= gpus:
            raise UserError(f"more processes than GPUs ({gpus} here): lower --nproc-per-node")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    all_found = [None] * PROCESSES
    dist.all_gather_object(all_found, found)
    if all_found.count(found) < PROCESSES:
        raise UserError("the processes found different data or checkpoints: give all of them the same data and --out")


def distribute(network):
    """The same network; if there are other processes, its gradients are averaged over all of them."""
    return DistributedDataParallel(network) if PROCESSES > 1 else network


def leave_processes():
    """The first process goes on alone; the others end here."""
    if PROCESSES > 1:
        dist.destroy_process_group()
    if RANK:
        sys.exit()


def take_share(batches):
    """This process's share of each batch; batches yields (step, tensors...)."""
    for step, *tensors in batches:
        yield step, *(tensor.chunk(PROCESSES)[RANK] for tensor in tensors)


# %% Checkpoints
def save_checkpoint(path, content):
    """Write a dictionary, all or nothing: an interrupted write leaves the old file as it was."""
    write_atomically(path, functools.partial(torch.save, content))


def load_checkpoint(path, kind, **asked):
    """The checkpoint's content, a dictionary, or None if there is no such file.

    kind: the NamedTuple of its "settings", which must agree with `asked`. Raises UserError if they don't, or if the
    file is damaged or not a checkpoint.
    """
    if not path.exists():
        return None
    file = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load ignores checksums, and reads folder entries as zeros
            if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
                raise ValueError("a checksum is wrong")
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
        content |= {"settings": kind(**content["settings"]), "step": content["step"]}
    except Exception as error:  # of any kind: arbitrary bytes can fail anywhere
        raise UserError(f"{path}: damaged, or not a checkpoint of this lesson; --restart starts over") from error
    check_same(path, content["settings"], **asked)
    return content


def check_same(path, settings, **asked):
    """Raise UserError if a checkpoint's settings differ from those asked for."""
    there = settings._asdict()
    others = [f"{name} {there[name]}, not {asked[name]}" for name in asked if there[name] != asked[name]]
    if others:
        raise UserError(f"{path}: from another run ({', '.join(others)}); use its options, --restart or another --out")


def restore(path, checkpoint, state):
    """Load each part of the state, a dictionary, from the checkpoint. Raises UserError if one doesn't fit."""
    try:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: from another version of this lesson; --restart starts over") from error


# %% A resumable run
SAVE_EVERY = 120  # seconds
HOURS = "about {:.1f} hours to go; to save time: --restart with a smaller --epochs, or 04_unet_cond.py --pretrained"
PREVIEW_AT = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)  # fractions of the steps


@contextlib.contextmanager
def stop_signals():
    """Catch Ctrl-C and SIGTERM, and append each to the list that this yields. A second Ctrl-C stops at once."""
    stops = []

    def request_stop(number, frame):
        stops.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if len(stops) == 1:  # print() isn't safe here: the signal may have interrupted another print()
            with contextlib.suppress(OSError):  # in `… 2>&1 | tee log`, Ctrl-C ends tee as well
                os.write(2, b"\nfinishing this step, then saving; press Ctrl-C again to stop without saving\n")

    kinds = (signal.SIGINT, signal.SIGTERM) if PROCESSES == 1 else ()  # several processes would stop at different steps
    handlers = {kind: signal.signal(kind, request_stop) for kind in kinds}
    try:
        yield stops
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def read_numbers(recent, step):
    """The numbers from a loop's latest steps, `(steps, numbers)`. Raises UserError if one is not finite."""
    values = torch.stack(recent).cpu()
    if not values.isfinite().all():
        tip = "try --restart with another --batch-size or --seed, or --sample-only with the last checkpoint"
        raise UserError(f"the loss or its gradient was no longer finite by step {step:,}: {tip}")
    return values


def draw_progress(folder, settings, losses, previews):
    """Draw `progress.png`, a row of samples for each preview, and `loss.png`. previews: tuples (step, uint8 images
    `(n, 1, h, w)`, {name: loss})."""
    rows = [f"{step * settings.batch_size:,} images\nloss {[*found.values()][-1]:.3f}" for step, _, found in previews]
    images = torch.cat([images for _, images, _ in previews]) / 127.5 - 1
    title = f"The same noise, as training goes on\n{settings.title}"
    save_picture(folder / "progress.png", plot_grid, title, images, len(previews[0][1]), rows, quiet=True)
    save_picture(folder / "loss.png", plot_losses, f"The loss\n{settings.title}", losses, previews, quiet=True)


def run_resumable(loop, preview, state, path, checkpoint):
    """Run a training loop with a progress bar, previews and checkpoints, or resume it after an interruption or a crash.

    loop:       loop(first) is a generator. It does steps first, first + 1, ..., and after each one yields (step, loss)
                and any other numbers that must stay finite; all but step are tensors.
    preview:    preview() returns samples `(n, 1, h, w)` in [-1, 1], and losses by name. It is called after a hundredth
                and after each tenth of the steps; then `progress.png` and `loss.png` are drawn beside the checkpoint.
    state:      everything the loop changes, by name: objects with `state_dict` and `load_state_dict`.
    path:       of the checkpoint, written every two minutes, at the end, and on Ctrl-C or SIGTERM.
    checkpoint: what `load_checkpoint` returned, or {"settings": settings, "step": 0} for a new run. Settings are a
                NamedTuple with at least `steps`, `batch_size` and `title`.

    Raises UserError if a number is not finite; OSError if the last save fails; SystemExit(130) after Ctrl-C
    or SIGTERM.
    """
    settings, steps, size = checkpoint["settings"], checkpoint["settings"].steps, checkpoint["settings"].batch_size
    first, losses, previews, recent = checkpoint["step"], torch.full((steps,), math.nan), [], []
    if first:
        restore(path, checkpoint, state)
        losses, previews = checkpoint["losses"], checkpoint.get("previews", [])
    print(f"training  {steps:,} steps of {size} images" + f", from step {first:,}" * (first > 0))
    # smoothing=0: the time left follows from the mean speed so far, so pauses for previews and saving count too
    count = {"total": steps * size, "initial": first * size, "unit": " images", "unit_scale": True, "smoothing": 0}
    bar = tqdm(**count, dynamic_ncols=True, disable=RANK > 0)
    milestones = {max(1, round(share * steps)) for share in PREVIEW_AT} if RANK == 0 else ()
    start = saved = time.monotonic()
    shown, minute = 0, start + 60
    with stop_signals() as stops, bar:
        for step, *numbers in loop(first):
            if PROCESSES > 1:
                dist.all_reduce(numbers[0])
                numbers[0] = numbers[0] / PROCESSES
            recent.append(torch.stack(numbers))
            done, now = step + 1, time.monotonic()
            if not stops:  # a signal may mean that the terminal is gone, and writing there would prevent the save
                bar.update(size)
            last = bool(stops) or done == steps  # a signal from now on waits for the next step
            due = RANK == 0 and (last or now > saved + SAVE_EVERY)
            if last or due or done in milestones or now > shown + 1:  # not at every step: reading waits for the GPU
                losses[done - len(recent) : done] = read_numbers(recent, done)[:, 0]
                recent, shown = [], now
                bar.set_postfix(loss=f"{losses[max(0, done - 20) : done].mean():.3f}", refresh=False)
            if now > minute:
                minute, hours = math.inf, (now - start) / (done - first) * (steps - done) / 3600
                if hours > 1:
                    tqdm.write(HOURS.format(hours))
            if done in milestones:
                images, measured = preview()
                previews.append((done, ((images + 1) * 127.5).round().byte(), measured))
                draw_progress(path.parent, settings._replace(steps=done), losses[:done].numpy(), previews)
            if due:
                content = {"settings": settings._asdict(), "step": done, "losses": losses, "previews": previews}
                content |= {name: part.state_dict() for name, part in state.items()}
                try:
                    save_checkpoint(path, content)
                except OSError as error:
                    if last:
                        raise
                    tqdm.write(f"{error}; trying again in two minutes")
                saved = time.monotonic()
            if last:
                break
    print(f"wrote {path}")
    if stops:
        python = "python" if shutil.which("python") == sys.executable else sys.executable
        again = shlex.join([python, *(argument for argument in sys.argv if argument != "--restart")])
        print(f"stopped after step {done:,} of {steps:,}. To resume:\n{again}")
        sys.exit(130)


# %% Options
def number(kind, low, high):
    """For argparse: parse a number of that kind (int or float) from low to high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            allowed = f"whole number from {low:,} to {high:,}" if kind is int else f"number from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be a {allowed}, got {text!r}")
        return value

    return parse


def make_parser(script, description):
    """The command line that all scripts share: --out DIR. script: its `__file__`; description: its docstring."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0], allow_abbrev=False)
    out = RUNS / Path(script).stem
    said = "folder to write to (default: %(default)s)"
    parser.add_argument("--out", type=writable_folder, default=str(out), metavar="DIR", help=said)
    return parser


def make_run_parser(script, description, presets):
    """The parser for a training script, and its group of mutually exclusive options. The lesson sets the defaults of
    --n and --steps."""
    parser = make_parser(script, description)
    add, count = parser.add_argument, number(int, 1, 10**6)
    add("--data", choices=data.NAMES, default="auto", help="auto: Fashion-MNIST, or synthetic garments if unavailable")
    add("--data-dir", metavar="DIR", help="IDX files, or a subfolder of images per class (default: $FASHION_MNIST_DIR)")
    add("--preset", choices=presets, help="network and training settings (default: small)")
    add("--epochs", metavar="E", type=number(float, 1e-9, 1e6), help="passes over the data (default: from the preset)")
    add("--batch-size", metavar="B", type=count, help="images per training step (default: the preset's)")
    add("--seed", metavar="S", type=number(int, 0, 2**63), default=0, help="random seed (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: cuda if available, else cpu")
    add("--show", action="store_true", help="run the sections instead of training; pictures go to lesson/ in --out")
    add("--n", metavar="N", type=count, help="images to sample; in lesson 4, per class (default: %(default)s)")
    add("--steps", metavar="S", type=count, help="sampling steps (default: %(default)s)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--restart", action="store_true", help="train from scratch, even if there is a checkpoint")
    group.add_argument("--sample-only", action="store_true", help="sample from the checkpoint; needs no data")
    return parser, group


def parse_run_options(parser):
    """Parse a training script's command line. With several processes, only the first one shows, samples and prints."""
    options = parser.parse_args()
    load_data.cache_clear()  # a second %run may find different data
    if options.show and (options.data, options.device) != ("auto", "auto"):
        parser.error("--show takes neither --data nor --device (use --data-dir for your own images)")
    if options.data_dir == "":
        parser.error("--data-dir is empty (an unset variable?): name a folder, or leave it out")
    folder, variable = options.data_dir, os.environ.get("FASHION_MNIST_DIR")
    if not folder and variable and options.data != "garments" and not data.fashion_mnist.is_in(data.expand(variable)):
        folder = variable  # its images are the training data
    if folder and options.out.resolve().is_relative_to(data.expand(folder).resolve()):
        parser.error(f"--out must not lie in {folder}, or new pictures could become training data")
    if options.show and options.data_dir:
        os.environ["FASHION_MNIST_DIR"] = options.data_dir
    options.sample_only |= getattr(options, "pretrained", False)
    if options.sample_only and (options.epochs or options.preset):
        parser.error("--epochs and --preset are for training: leave them out when only sampling")
    if RANK:
        sys.stdout = io.StringIO()
        if options.show or options.sample_only:
            sys.exit()
    if not options.show:
        options.device = choose_device(options.device)
    return options
