"""Forward networks as chains of stages, and the feedback mirror of each kind of stage."""

from bioprop.networks.invertible_mlp import InvertibleMLP, InvertibleStage
from bioprop.networks.lenet import LeNet
from bioprop.networks.mirrors import Mirror, build_mirror
from bioprop.networks.mlp import MLP
from bioprop.networks.network import Network, build_network
from bioprop.networks.outer_mirrors import OuterMirror, build_outer_mirror
from bioprop.networks.resnet import ResNet
from bioprop.networks.simple_vgg import SimpleVGG
from bioprop.networks.stages import ConvStage, LayerStage, LinearStage, Stage, StageOutput, StagePass
from bioprop.networks.standardized import StandardizedStage

__all__ = [
    "MLP",
    "ConvStage",
    "InvertibleMLP",
    "InvertibleStage",
    "LayerStage",
    "LeNet",
    "LinearStage",
    "Mirror",
    "Network",
    "OuterMirror",
    "ResNet",
    "SimpleVGG",
    "Stage",
    "StageOutput",
    "StagePass",
    "StandardizedStage",
    "build_mirror",
    "build_network",
    "build_outer_mirror",
]
