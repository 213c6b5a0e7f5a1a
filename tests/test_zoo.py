"Names and sizes of the zoo beside the published figures"
import pytest
import torch
from deqdet.zoo import create_detector, list_detectors, zoo


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
