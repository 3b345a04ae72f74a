"""Models of timm's families, each with the arguments that make it small; the others are small as they are."""

from __future__ import annotations

from typing import Any

_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_SWIN: dict[str, Any] = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 24,
    "depths": (1, 1),
    "num_heads": (3, 6),
}
_STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)}
_BRANCHES: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 32), "num_heads": (1, 2, 4, 4)}
_BASIC: dict[str, Any] = {"channels": (8, 16, 24, 32)}

TIMM: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": _VIT,
    "cait_xxs24_224": {**_VIT, "depth_token_only": 1},
    "convit_tiny": {**_VIT, "local_up_to_layer": 1},
    "convnext_atto": _STAGES,
    "convnextv2_atto": _STAGES,
    "davit_tiny": _BRANCHES,
    "deit_tiny_patch16_224": _VIT,
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "dla46x_c": {},
    "edgenext_xx_small": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {},
    "eva02_tiny_patch14_224": _VIT,
    "ghostnet_050": {},
    "inception_next_tiny": _STAGES,
    "lcnet_050": {},
    "mambaout_femto": _STAGES,
    "mnasnet_small": {},
    "mobilenetv3_small_050": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "pvt_v2_b0": _BRANCHES,
    "regnetx_002": {},
    "regnety_002": {},
    "repghostnet_050": {},
    "repvgg_a0": {"width_factor": 0.25},
    "resnet18": _BASIC,
    "resnet26": {"channels": (8, 8, 16, 16)},
    "resnetv2_18": {"channels": (16, 32, 48, 64)},
    "rexnet_100": {"width_mult": 0.3},
    "seresnet18": _BASIC,
    "skresnet18": {"channels": (16, 16, 32, 32)},
    "starnet_s050": {},
    "swin_tiny_patch4_window7_224": _SWIN,
    "swinv2_tiny_window8_256": _SWIN,
    "tinynet_e": {},
    "vit_relpos_small_patch16_224": _VIT,
    "vit_tiny_patch16_224": _VIT,
    "xcit_nano_12_p16_224": _VIT,
}
