"""A third-party model pack: torchvision's Vision Transformers, which timm doesn't have.

probekit run --plugin examples/torchvision_vit.py --model tv:b16 --metrics all -d folder:photos
"""

from probekit import Layout, ModelSpec, Preprocessing, Weights, hookimpl

PROBEKIT_API = 1


def build(variant, image_size=None):
    from torchvision.models import vision_transformer

    return getattr(vision_transformer, f"vit_{variant[0]}_{variant[1:]}")(
        image_size=(image_size or (224,))[0]
    )


def _entry(variant, file, heads, layers):
    url, layout = f"https://download.pytorch.org/models/{file}", Layout(name="torchvision file")
    return ModelSpec(
        name="tv",
        variant=variant,
        summary=f"torchvision's ViT-{variant.upper()}, supervised on ImageNet-1k",
        target="torchvision_vit:build",
        objective="supervised",
        weights=Weights(url=url, filename=file, licence="BSD-3-Clause", layout=layout),
        preprocessing=Preprocessing(interpolation="bilinear"),
        heads=heads,
        layers=layers,
    )


@hookimpl
def probekit_models():
    return [_entry("b16", "vit_b_16-c867db91.pth", 12, 12), _entry("l16", "vit_l_16-852ce7e3.pth", 16, 24)]
