"Names and sizes of the zoo beside the published figures"
from dataclasses import replace
from functools import partial
import pytest
import torch
from deqdet.backbone import Pyramid, create_body
from deqdet.zoo import create_detector, deformable_tiny, list_detectors, zoo


def test_names_by_pattern(): assert list_detectors('deqdet_r*') == ['deqdet_r50_1x', 'deqdet_r50_2x', 'deqdet_r101_2x']


def test_a_detector_with_a_vocabulary_and_changed_fields():
    model = create_detector('deqdet_tiny', vocab=['cat', 'dog'], n_queries=20, grid=())
    assert (model.hyper.n_classes, model.vocab, len(model.queries.content.weight)) == (2, ['cat', 'dog'], 20)


@pytest.mark.parametrize('name, total, unused', [
    ('deqdet_r50_1x', 101.028232, 23.269120), ('deqdet_r50_2x', 101.080232, 23.269120), ('deqdet_r101_2x', 120.072360, 23.269120),
    ('deqdet_swins_2x', 120.881202, 23.269120), ('adamixer_r50_1x', 134.790904, 0.)])
def test_parameters_counted_off_the_released_code(name, total, unused):
    "Boxes that queries start from count there although they never learn; here they are a buffer"
    with torch.device('meta'): model = create_detector(name)
    params = sum(p.numel() for p in model.parameters())/1e6
    assert params + 4*zoo[name].hyper.n_queries/1e6 == pytest.approx(total - unused, abs=1e-6)


@pytest.mark.parametrize('name, total', [('sparse_rcnn_r50_100', 106.290888), ('sparse_rcnn_r50_300', 106.342888)])
def test_parameters_of_sparse_rcnn(name, total):
    with torch.device('meta'): model = create_detector(name)
    assert sum(p.numel() for p in model.parameters())/1e6 == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize('name', [*list_detectors('*_tiny'), 'deqdet_small'])
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = create_detector(name, n_classes=3)
    sum((p.logits**2).sum() + p.boxes.sum() for p in model(torch.rand(2, 3, 64, 64))).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def a_two_stage(): return replace(deformable_tiny, two_stage=True).build()


def a_swin():
    net = create_body('swin_tiny_patch4_window7_224', frozen_stages=-1)
    model = create_detector('deqdet_tiny')
    model.pyramid = Pyramid(net, model.hyper.neck(net.channels))
    return model


EMPTY = {n: partial(create_detector, n) for n in list_detectors('*_tiny')} | dict(two_stage=a_two_stage, swin=a_swin)


@pytest.mark.parametrize('make', EMPTY.values(), ids=EMPTY)
def test_an_empty_batch_gives_empty_results(make):
    "torchvision's detectors accept an empty list"
    model = make()
    images = torch.zeros(0, 3, 64, 64, dtype=torch.uint8)
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    preds = model(images)
    assert {tuple(p.boxes.shape) for p in preds} <= {(0, 12, 4), (0, 85, 4)} # the second of proposals
    sum((p.logits**2).sum() + p.boxes.sum() for p in preds).backward()
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers() if 'num_batches' not in k)
    assert model.predict(images, torch.zeros(0, 2, dtype=torch.long), orig=torch.zeros(0, 2)) == []
    assert model.trajectory(images)[-1][1].boxes.shape == (0, 12, 4)
