"""Region proposals: what reading a network must leave alone, and the notebook that makes the small one."""
import json

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn, retinanet_resnet50_fpn

from wsol_nb import rpn as module
from wsol_nb.core import SettingsError
from wsol_nb.models import WEIGHTS_FOLDER
from wsol_nb.rpn import MiniRPN, region_proposals, rpn

SMALL = dict(pretrained=False, min_size=64, max_size=96)


@pytest.fixture
def pictures():
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (*shape, 3), np.uint8)) for shape in ((96, 96), (96, 96), (50, 80), (96, 96))]


def mini():
    torch.manual_seed(0)
    return rpn("mini_rpn", pretrained=False)


def test_a_picture_does_not_depend_on_its_neighbours(pictures):
    """Batches hold pictures of one size, so alone or among others the boxes are the same."""
    network = mini()
    together = region_proposals(network, pictures, count=20)
    for picture, found in zip(pictures, together, strict=True):
        alone = region_proposals(network, [picture], count=20)[0]
        np.testing.assert_allclose(alone.scores, found.scores, atol=1e-5)
        assert (alone.boxes == found.boxes).mean() > .9      # sums in another order may move a corner over a half


def test_the_network_is_left_as_it_was(pictures):
    network = mini().train()
    network.backbone.block1.eval()
    modes, state = [m.training for m in network.modules()], {k: v.clone() for k, v in network.state_dict().items()}
    region_proposals(network, pictures)
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_the_boxes_are_those_torchvision_keeps(pictures):
    """Boxes come from torchvision's own forward pass of the proposal stage, to the last pixel."""
    torch.manual_seed(0)
    network = rpn("fasterrcnn_resnet50_fpn", **SMALL)
    tensor = torch.from_numpy(np.array(pictures[2])).permute(2, 0, 1) / 255
    with torch.no_grad():
        batch, _ = network.transform([tensor])
        boxes, _ = network.rpn(batch, network.backbone(batch.tensors))
    scale = torch.tensor([80 / batch.image_sizes[0][1], 50 / batch.image_sizes[0][0]]).repeat(2)
    ours = region_proposals(network, [pictures[2]])[0]
    assert len(ours.boxes) == len(boxes[0])
    assert np.abs(ours.boxes + [0, 0, 1, 1] - (boxes[0] * scale).numpy()).max() < 1.01


def test_published_filter():
    """1,000 boxes of each feature map before the filter, an overlap of 0.7, 1,000 after it."""
    for network in (mini(), rpn("fasterrcnn_resnet50_fpn", **SMALL)):
        stage = network.rpn
        assert (stage.pre_nms_top_n(), stage.nms_thresh, stage.post_nms_top_n()) == (1000, .7, 1000)


def test_other_detectors(pictures):
    """Mask R-CNN has the same first stage; a one-stage detector has none and says so."""
    with torch.no_grad():
        mask = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=96)
    assert len(region_proposals(mask, pictures[:1], count=5)[0].boxes) == 5
    with torch.device("meta"):
        single = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    with pytest.raises(SettingsError, match="a RetinaNet has no region proposal network"):
        region_proposals(single, pictures)


def test_weights_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(SettingsError, match="nbs/pretraining/mini_rpn.ipynb"):
        rpn("mini_rpn")

    def unreachable(*args, **settings):
        raise OSError("no route to host")
    monkeypatch.setattr(FasterRCNN_ResNet50_FPN_Weights, "get_state_dict", unreachable)
    with pytest.raises(SettingsError, match="no route to host.*checkpoint=PATH"):
        rpn("fasterrcnn_resnet50_fpn")
    with pytest.raises(SettingsError, match="checkpoint .* does not exist"):
        rpn("fasterrcnn_resnet50_fpn", checkpoint=tmp_path / "none.pth", min_size=64)


def test_shipped_weights_and_their_card():
    """Weights are half floats that fit the network; the card says what the issue asks of it."""
    card = json.loads((WEIGHTS_FOLDER / "mini_rpn.json").read_text(encoding="utf-8"))
    assert {"data", "privilege", "selection", "measurements", "command", "curve", "core_seconds"} <= set(card)
    assert card["parameters"] == sum(p.numel() for p in MiniRPN().parameters())
    path = WEIGHTS_FOLDER / "mini_rpn.safetensors"
    assert path.stat().st_size == card["bytes"] < 2_000_000
    with safetensors.safe_open(path, "pt") as file:
        assert {file.get_slice(k).get_dtype() for k in file.keys() if "num_batches" not in k} == {"F16"}
    assert not rpn("mini_rpn").training
