"""Per-sample augmentation of whole batches, on whatever device the batch is on.

torchvision's transforms draw one random number for a whole batch; here every image has its own draws, made beforehand
by `bioprop.datamodules.loader.ResidentLoader`, so that this function is deterministic.
"""

import torch
from torch import Tensor


def crop_and_flip(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Crops every image out of itself padded by repeating its edge, then mirrors it left to right where told.

    `out[b, c, y, x] = images[b, c, clamp(y + dy_b - padding), clamp(x' + dx_b - padding)]`, where `x' = width - 1 - x`
    for a mirrored image and `x' = x` otherwise. Clamping an index to the image is edge padding without a padded copy.

    Args:
        images: [batch, channels, height, width], any type of number.
        draws: int64 [batch, 3]: vertical offset `dy` and horizontal offset `dx` of the crop in pixels, both in
            0..2 * padding (`padding` is the image itself), and 1 for an image to mirror, 0 otherwise.
        padding: Width of the border in pixels.

    Returns:
        Images of the same shape and type.
    """
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + draws[:, 0:1] - padding
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    columns = torch.where(draws[:, 2:3] == 1, width - 1 - columns, columns) + draws[:, 1:2] - padding
    # one gather along flattened pixels: faster on a CPU than indexing with a row and a column tensor
    pixels = rows.clamp(0, height - 1).unsqueeze(2) * width + columns.clamp(0, width - 1).unsqueeze(1)
    index = pixels.flatten(1).unsqueeze(1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images)
