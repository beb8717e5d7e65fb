"""The package from Python: L-DRL on your own data loaders, with Lightning's Trainer and the angle to BP.

python -m examples.trainer
"""

import torch
from pytorch_lightning import Trainer
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

from bioprop.algorithms import LDRL
from bioprop.callbacks import AlignmentToBackprop
from bioprop.networks import LeNet


def main(epochs: int = 10) -> dict[str, float]:
    """Train; return ``val/accuracy``, a share, and ``angle/<stage>`` in degrees after the last epoch."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)  # [n, channels, height, width]
    images = (images - images.mean()) / images.std()
    held, rest = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.2, 0.8])

    network = LeNet(image_shape=(1, 8, 8), num_classes=10, channels=(16, 32), hidden=64)
    algorithm = LDRL(network, optimizer=lambda weights: torch.optim.SGD(weights, lr=0.02, momentum=0.9))
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[AlignmentToBackprop()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(algorithm, DataLoader(rest, batch_size=64, shuffle=True), DataLoader(held, batch_size=256))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:24s} {value:.3f}")  # noqa: T201
