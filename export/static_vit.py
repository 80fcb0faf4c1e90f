"""`static-vit`: a plain ViT-Tiny of Tiny-ImageNet shape, for trying the pipeline without weights.

Patch 4 gives 16 x 16 patches at 64 px and 8 x 8 at 32 px. With patch 8 the low rung would have
16 patches and cost as much as the high one at batch 1 (fixed costs dominate), leaving nothing to
gain from escalating selectively; with patch 4 it is 2.6 times cheaper at batch 1 on a CPU and 4.6
times at batch 16.
"""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification

from export.backbones import Backbone
from imaging import Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The library's initialiser (std 0.02) leaves nearly the same output for every image: its CLS
# embeddings at the two resolutions have a cosine of 0.99, so no image would ever be worth
# escalating. Weights of std 1.5 / sqrt(fan-in) bring that to 0.90, differently for each image.
INIT_GAIN = 1.5


def static_vit(seed: int = 0) -> Backbone:
    """Build `static-vit`.

    Args:
        seed: of the weights.
    """
    config = ViTConfig(
        image_size=64,
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        num_labels=200,
        attn_implementation="eager",
    )
    model = ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(seed)
    tables = ("cls_token", "position_embeddings")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(tables):
                parameter.normal_(std=config.initializer_range, generator=generator)
            elif parameter.ndim > 1:  # Linear (out, in) and Conv (out, in, h, w)
                fan_in = parameter[0].numel()
                parameter.normal_(std=INIT_GAIN / fan_in**0.5, generator=generator)
    return Backbone(
        name="static-vit",
        source={"kind": "seed", "seed": seed, "init_gain": INIT_GAIN},
        model=model.eval(),
        labels=None,
        default_px=(32, 64),
        preprocessing=lambda px: Preprocessing(
            height=px,
            width=px,
            resize_shortest_edge=px,
            resample="bicubic",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        ),
    )
