"Folding BatchNorm: results of whole detectors on several bodies, and what is left alone"
import pytest, timm, torch
from torch import nn
from deqdet.ops.folding import fold, folded, followed
from deqdet.zoo import create_detector


def trained_norms(net):
    "Norms as a training leaves them"
    torch.manual_seed(0)
    for m in net.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        m.running_mean.normal_(std=.1)
        m.running_var.uniform_(.5, 2)
        nn.init.uniform_(m.weight, .5, 1.5)
        nn.init.normal_(m.bias, std=.1)
    return net.eval()


def norms(net): return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


@pytest.mark.parametrize('name', ['deqdet_tiny', 'deqdet_lite', 'deformable_detr_tiny', 'deq_sparse_rcnn_tiny'])
def test_a_folded_detector_detects_as_before(name):
    model = trained_norms(create_detector(name, n_classes=3, start=False))
    was = {k: v.clone() for k, v in model.state_dict().items()}
    fast = folded(model)
    images, sizes = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96], [50, 60]])
    with torch.no_grad():
        a, b = (m.pyramid(images, sizes) for m in (model, fast))
        for x, y in zip(a, b): assert (x.float() - y.float()).abs().max() < 1e-5*x.float().abs().max()
        a, b = (m(images, sizes)[-1] for m in (model, fast))
    assert (a.logits - b.logits).abs().max() < 1e-3 and (a.boxes - b.boxes).abs().max() < 1e-2
    assert norms(fast)==0 < norms(model) and all(torch.equal(v, was[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in fast.parameters())


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv3_small_050', 'convnext_atto'])
def test_bodies_of_timm(name):
    net = trained_norms(timm.create_model(name, features_only=True))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): want = net(x)
    n = len(followed(net, x))
    assert n==norms(net) and norms(fold(net, x))==0
    with torch.no_grad():
        for a, b in zip(net(x), want): assert (a - b).abs().max() < 1e-5*max(1, b.abs().max())


def test_a_norm_before_its_convolution_stays():
    net = trained_norms(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)))
    x = torch.randn(1, 3, 8, 8)
    want = net(x)
    assert followed(net, x)==[] and torch.equal(fold(net, x)(x), want)


class Twice(nn.Module):
    "One convolution that two norms read"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
    def forward(self, x): return sum(norm(self.conv(x)) for norm in self.norms)


def test_a_convolution_that_two_norms_read_stays():
    net = trained_norms(Twice())
    x = torch.randn(1, 3, 8, 8)
    want = net(x)
    assert followed(net, x)==[] and torch.equal(fold(net, x)(x), want)


def test_the_copy_keeps_its_classes_but_no_record():
    fast = folded(create_detector('deqdet_tiny', n_classes=3, start=False))
    assert (fast.hyper, fast.n_classes)==(None, 3)
