"""Forward networks as chains of stages, and the feedback mirror of each kind of stage."""

from bioprop.networks.lenet import LeNet
from bioprop.networks.mirrors import Mirror, build_mirror
from bioprop.networks.mlp import MLP
from bioprop.networks.network import Network, build_network
from bioprop.networks.resnet import ResNet
from bioprop.networks.simple_vgg import SimpleVGG
from bioprop.networks.stages import ConvStage, LayerStage, LinearStage, Stage, StageOutput, StagePass

__all__ = [
    "MLP",
    "ConvStage",
    "LayerStage",
    "LeNet",
    "LinearStage",
    "Mirror",
    "Network",
    "ResNet",
    "SimpleVGG",
    "Stage",
    "StageOutput",
    "StagePass",
    "build_mirror",
    "build_network",
]
