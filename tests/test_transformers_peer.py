"What benchmarks/transformers_peer.py hands to a detector of transformers, and takes from it"
import sys
from argparse import Namespace
from pathlib import Path
import pytest, torch
from torchvision.ops import box_convert
from deqdet.data import Target

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'))
from transformers_peer import KINDS, TransformersPeer


def batch():
    "Two images, padded to 64x96; of the second one 32x48 pixels are the image, halved from the original"
    sizes = torch.tensor([[64, 96], [32, 48]])
    boxes = torch.tensor([[[0., 0, 96, 64], [10, 10, 30, 20]], [[12, 8, 36, 24], [0, 0, 0, 0]]])
    labels = torch.tensor([[1, 0], [2, -1]])
    orig = torch.tensor([[64, 96], [64, 96]])
    return torch.full((2, 3, 64, 96), 255, dtype=torch.uint8), sizes, Target(boxes, labels, sizes, torch.arange(2), orig)


def test_truth_is_what_the_model_learns():
    "Boxes are parts of the padded image, padded objects are left out, and padding is the mean pixel"
    images, sizes, target = batch()
    peer = TransformersPeer.__new__(TransformersPeer)
    first, second = peer.truth(images, target)
    assert first['class_labels'].tolist()==[1, 0] and second['class_labels'].tolist()==[2]
    assert first['boxes'][0].tolist()==[.5, .5, 1, 1]
    assert second['boxes'].tolist()==[[.25, .25, .25, .25]]
    pixels = peer.pixels(images, sizes)
    assert pixels[1, :, :32, :48].eq(1).all() and pixels[1, :, 32:].eq(0).all()


def test_detections_are_in_pixels_of_the_original():
    "What was learned from a batch comes back as its boxes, at the scale of each file"
    images, sizes, target = batch()
    peer = TransformersPeer.__new__(TransformersPeer)
    parts = torch.stack([o['boxes'][0] for o in peer.truth(images, target)])
    peer.net = lambda pixels: None
    def post(out, threshold, target_sizes):
        h,w = target_sizes.unbind(1)
        whwh = torch.stack([w, h, w, h], 1)
        return [dict(boxes=b[None]) for b in box_convert(parts, 'cxcywh', 'xyxy')*whwh]
    peer.post = post
    found = [d['boxes'][0].tolist() for d in peer.detect(images, sizes, target)]
    assert found==[[0, 0, 96, 64], [24, 16, 72, 48]]


@pytest.mark.parametrize('kind', ['rtdetr', 'dfine'])
def test_a_detector_of_transformers(kind):
    "It trains: each weight once, BatchNorms that begin at 1, a loss that reaches all that learns"
    pytest.importorskip('transformers')
    peer = KINDS[kind](['a', 'b', 'c'], args=Namespace(frozen=3))
    net = peer.net.train()
    sizes = [v.data_ptr() for v in net.state_dict().values() if v.numel()]
    assert len(sizes)==len(set(sizes))
    norms = [m for k,m in net.named_modules() if isinstance(m, torch.nn.BatchNorm2d) and '.body.' not in k]
    assert norms and all(m.weight.eq(1).all() for m in norms)
    peer.loss(*batch()).backward()
    assert not [k for k,p in net.named_parameters() if p.requires_grad and p.grad is None]
    found = net.eval() and peer.detect(*batch())
    assert len(found)==2 and len(found[0]['scores'])==100
