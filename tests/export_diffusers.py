"""Write a network trained by lesson 3 or 4 as a diffusers UNet2DModel.

    python tests/export_diffusers.py CHECKPOINT DIR

CHECKPOINT is a run's checkpoint.pt, or cond.pt. DIR gets the network, for UNet2DModel.from_pretrained(DIR), and the
noise levels, for EDMDPMSolverMultistepScheduler.from_pretrained(DIR). docs/diffusers.md has the lines that sample with
the two; they also do the work of our `Denoiser`, which is not exported.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch
from diffusers import EDMDPMSolverMultistepScheduler, UNet2DModel
from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lesson_tools as tools

lesson3 = importlib.import_module("03_unet_uncond")

# Our names for the layers, and diffusers'
AROUND = {
    "conv_in": "conv_in",
    "embed_time.linear1": "time_embedding.linear_1",
    "embed_time.linear2": "time_embedding.linear_2",
    "embed_label": "class_embedding",
    "conv_out.norm": "conv_norm_out",
    "conv_out.conv": "conv_out",
}
IN_BLOCK = {
    "conv1.norm": "resnets.{}.norm1",
    "conv1.conv": "resnets.{}.conv1",
    "conv2.norm": "resnets.{}.norm2",
    "conv2.scale_shift.linear": "resnets.{}.time_emb_proj",
    "conv2.conv": "resnets.{}.conv2",
    "shortcut": "resnets.{}.conv_shortcut",
    "attention.norm": "attentions.{}.group_norm",
    "attention.attention.qkv": "attentions.{}.qkv",
    "attention.attention.proj": "attentions.{}.to_out.0",
}


def rename(layer):
    """Diffusers' name for one of our layers. Raises KeyError if diffusers has no such layer."""
    match layer.split(".", 3):
        case ["down" | "up" as path, level, block, rest]:
            return f"{path}_blocks.{level}." + IN_BLOCK[rest].format(block)
        case ["downsample", level]:
            return f"down_blocks.{level}.downsamplers.0.conv"
        case ["upsample", level, "1"]:
            return f"up_blocks.{level}.upsamplers.0.conv"
        case ["middle", block, *rest]:
            return "mid_block." + IN_BLOCK[".".join(rest)].format(block)
    return AROUND[layer]


def convert(state):
    """Our network's parameters, a dictionary of tensors, under diffusers' names. Raises KeyError for unknown ones."""
    converted = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        theirs = rename(layer)
        if theirs.endswith(".qkv"):  # queries, keys and values: one layer of ours, three of theirs
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{theirs.removesuffix('qkv')}to_{letter}.{kind}"] = rows
        else:
            converted[f"{theirs}.{kind}"] = tensor
    return converted


def make_unet(settings):
    """An untrained UNet2DModel with the structure of a run's network; settings: its `RunSettings`."""
    preset = lesson3.PRESETS[settings.preset]
    conditional = settings.network == "CondUNet"
    padded = lesson3.pad(torch.empty(1, 1, *settings.size), preset).shape[2:]
    attends = [conditional and level in preset.attention_levels for level in range(len(preset.widths))]
    return UNet2DModel(
        sample_size=tuple(side // preset.patch for side in padded),
        in_channels=preset.patch**2,
        out_channels=preset.patch**2,
        block_out_channels=preset.widths,
        layers_per_block=preset.depth,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        add_attention=conditional,
        attention_head_dim=preset.head_dim,
        norm_num_groups=preset.groups,
        attn_norm_num_groups=preset.groups,
        num_class_embeds=len(settings.classes) + 1 if conditional else None,
        resnet_time_scale_shift="scale_shift",
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def export(path, folder):
    """Write the averaged weights of the checkpoint at `path` to `folder`, which is created if necessary.

    Raises UserError if the checkpoint can't be exported, or the folder can't be written to.
    """
    checkpoint = tools.load_checkpoint(path, lesson3.RunSettings)
    if checkpoint is None:
        raise tools.UserError(f"{path}: no checkpoint there")
    settings = checkpoint["settings"]
    if settings.network == "UntimedUNet":
        raise tools.UserError(f"{path}: a network without time (--no-time) can't be a UNet2DModel, which takes a time")
    try:
        state = {name.removeprefix("network."): tensor for name, tensor in checkpoint["ema"].items()}
        unet = make_unet(settings)
        unet.load_state_dict(convert(state))
    except (KeyError, RuntimeError, ValueError) as error:
        raise tools.UserError(f"{path}: not a network of these lessons, or from another version of them") from error
    sigmas = {"sigma_min": lesson3.SIGMA_MIN, "sigma_max": lesson3.SIGMA_MAX, "sigma_data": settings.sigma_data}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unet.save_pretrained(folder)
        EDMDPMSolverMultistepScheduler(**sigmas).save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise tools.UserError(f"DIR must be a writable folder ({error})") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint.pt of a run of 03 or 04")
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder to write to")
    options = parser.parse_args()
    export(options.checkpoint, options.dir)
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"):
        print(f"wrote {options.dir / name}")


if __name__ == "__main__":
    tools.run_command(main)
