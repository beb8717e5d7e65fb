"""``bioprop export`` writes the trained network, and refuses in a sentence what it cannot write."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from bioprop.algorithms import LDRL
from bioprop.cli import main as run
from bioprop.experiments import export as exporting
from bioprop.experiments.export import main
from bioprop.networks import LeNet
from bioprop.testing.helpers import refused
from tests.test_cli import LDRL_TINY, TINY, in_empty_folder

__all__ = ["in_empty_folder"]  # the fixture
BEST = "runs/ldrl_lenet_digits/version_0/checkpoints/best.ckpt"


def test_a_state_dict_loads_into_a_plain_network(capsys: pytest.CaptureFixture[str]) -> None:
    trained = run(["fit", *LDRL_TINY, "--trainer.max_epochs=1"])
    assert main([f"--ckpt_path={BEST}", "--to=out/net.pt"]) == 0
    said = capsys.readouterr().out
    mean, _ = trained.datamodule.statistics(torch.device("cpu"))
    assert f"mean [{round(float(mean), 4)}]" in said
    network = LeNet(image_shape=(1, 16, 16), num_classes=10, channels=(4, 4), hidden=8)
    network.load_state_dict(torch.load("out/net.pt", weights_only=True))
    images = torch.randn(4, 1, 16, 16)
    assert torch.equal(network(images), LDRL.load_from_checkpoint(BEST)(images))
    with refused("net.pt is there already"):
        main([f"--ckpt_path={BEST}", "--to=out/net.pt"])
    with refused("its ending must be .pt (a state dict) or .onnx"):
        main([f"--ckpt_path={BEST}", "--to=net.zip"])
    with refused("nowhere.ckpt cannot be read as a checkpoint: it is not there"):
        main(["--ckpt_path=nowhere.ckpt", "--to=net.pt"])
    with pytest.raises(SystemExit) as stopped:
        main(["--ckpt_path=nowhere.ckpt"])
    assert stopped.value.code == 2
    assert "--to must be given: --help says what" in capsys.readouterr().err
    if any(importlib.util.find_spec(name) is None for name in exporting.ONNX):
        with refused("ONNX needs what is not installed", "pip install onnx onnxscript"):
            main([f"--ckpt_path={BEST}", "--to=net.onnx"])


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_an_onnx_graph_computes_the_same(tmp_path: Path) -> None:
    import onnxruntime  # type: ignore[import-not-found, unused-ignore]

    network = LeNet(image_shape=(1, 16, 16), num_classes=10, channels=(4, 4), hidden=8).eval()
    exporting.write_onnx(network, (1, 16, 16), tmp_path / "net.onnx")
    images = torch.randn(5, 1, 16, 16)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), network(images).detach(), rtol=1e-4, atol=1e-5)


def test_an_own_network_is_built_by_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n"
        "    def __init__(self, image_shape, num_classes, hidden: int = 3):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(256, hidden), nn.Tanh(), nn.Linear(hidden, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = ["--model=Backprop", "--model.network=own_nets.Net", "--model.network.hidden=5", *TINY[3:]]
    trained = run(["fit", *own, "--trainer.max_epochs=1"])
    best = trained.trainer.checkpoint_callback.best_model_path
    written: list[Any] = []
    monkeypatch.setattr(exporting, "write_onnx", lambda *given: written.append(given))
    monkeypatch.setattr(exporting, "ONNX", ())
    with refused("which only you can build: name its class by --network"):
        main([f"--ckpt_path={best}", "--to=net.onnx"])
    assert main([f"--ckpt_path={best}", "--to=net.onnx", "--network=own_nets.Net"]) == 0
    ((network, shape, _),) = written
    images = torch.randn(4, 1, 16, 16)
    assert list(shape) == [1, 16, 16]
    reloaded = torch.load(best, weights_only=True)["state_dict"]
    trained.model.load_state_dict(reloaded)
    assert torch.equal(network(images), trained.model.network.cpu()(images))
