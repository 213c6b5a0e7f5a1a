"Reading published checkpoints of every family; full-size names and shapes are in tests/parity/test_keys.py"
from dataclasses import replace
import pytest
import torch
from deqdet.convert import infer, infer_sparse, load_official, original_sparse, read_checkpoint, to_official
from deqdet.decoder import Stacked
from deqdet.equilibrium import Settled
from deqdet.families.shared import Shared
from deqdet.ops.errors import CommandError
from deqdet.zoo import create_detector, published

MIXER = dict(n_classes=5, body='', channels=(4, 6, 8, 10), feat_width=32, width=48, points=(16, 9), groups=4)
SPARSE = dict(n_classes=3, body='', channels=(4, 6, 8, 10), feat_width=16, width=32, heads=8, hidden=48, dynamic=8)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_detector('deqdet_tiny', **MIXER)


@pytest.fixture(scope='module')
def sd(model): return to_official(model)


def test_shapes_say_the_hyper_parameters(model, sd):
    found = infer(sd)
    for k in ('n_classes', 'channels', 'feat_width', 'width', 'heads', 'groups', 'points', 'out_points', 'hidden', 'neck_kernel'):
        assert getattr(found, k) == getattr(model.hyper, k), k


def test_a_file_as_pytorch_wrote_before_1_6(sd, tmp_path):
    torch.save(sd, tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    read = read_checkpoint(tmp_path/'old.pth')
    assert read.keys() == sd.keys() and all(torch.equal(v, sd[k]) for k, v in read.items())


def test_the_twin_answers_alike(model, sd, tmp_path):
    torch.save(dict(state_dict={f'module.{k}': v for k, v in sd.items()}), tmp_path/'x.pth')
    twin = load_official(tmp_path/'x.pth', strategy=model.hyper.strategy, norm_groups=model.hyper.norm_groups)
    assert same(model, twin)
    feats = [torch.randn(1, c, 64//s, 64//s) for c, s in zip((4, 6, 8, 10), (4, 8, 16, 32))]
    sizes = torch.tensor([[60, 64]])
    with torch.no_grad(): a, b = (m.eval()(feats, sizes)[-1].boxes for m in (model, twin))
    assert torch.equal(a, b)


@pytest.mark.parametrize('name, layout, steps', [
    ('sparse_rcnn_tiny', None, 'Stacked'), ('sparse_rcnn_tiny', original_sparse, 'Stacked'), ('deq_sparse_rcnn_tiny', None, 'Settled')])
def test_sparse_rcnn_of_both_code_bases(name, layout, steps):
    "The released equilibrium has its shared head once for every iteration"
    torch.manual_seed(0)
    model = create_detector(name, **SPARSE)
    sd = to_official(model, layout and layout(model.hyper))
    if name.startswith('deq'):
        sd |= {k.replace('bbox_head.1.', f'bbox_head.{i}.'): v for k, v in sd.items() if 'bbox_head.1.' in k for i in (2, 3)}
    twin = load_official(sd, finest=14., grid=model.hyper.grid)
    assert same(model, twin)
    assert type(twin.hyper.strategy).__name__ == steps
    assert twin.hyper.limit == (1000 if layout is None else 100000)/16


def test_a_tensor_of_another_shape_is_an_error(sd):
    with pytest.raises(ValueError, match=r'^1 tensors differ, such as pyramid.neck.norm.weight: \(7,\) in the checkpoint, \(32,\) in the'):
        load_official(sd | {'neck.gn_out.weight': torch.zeros(7)})


@pytest.mark.parametrize('name', ['deqdet_tiny', 'sparse_rcnn_tiny', 'deformable_detr_tiny'])
@pytest.mark.parametrize('change, said', [
    (dict(n_classes=2), r'cls\S*: \(3, \d+\) in the checkpoint, \(2, \d+\) in the model; deqdet.predict.start_from'),
    (dict(hidden=24), r'ffn\S*: \(\d+, \d+\) in the checkpoint, \(24, \d+\) in the model$')])
def test_fields_that_do_not_fit_are_an_error_of_one_line(name, change, said, tmp_path):
    "PyTorch lists each tensor: three classes for eighty took nine thousand letters"
    model = create_detector(name, n_classes=3, body='', channels=(4, 6, 8, 10))
    known = {k: getattr(model.hyper, k) for k in ('norm_groups', 'heads', 'encoder_heads') if hasattr(model.hyper, k)}
    torch.save(to_official(model), tmp_path/'a.pth')
    for source, kind in ((to_official(model), ValueError), (tmp_path/'a.pth', CommandError)):
        with pytest.raises(kind, match=said) as e: load_official(source, **known | change)
        assert len(str(e.value)) < 300 and len(str(e.value).splitlines()) == 1


def test_keys_that_do_not_fit_are_an_error_of_one_line(sd):
    with pytest.raises(KeyError, match='0 tensors are missing .* and 1 are unknown') as e: load_official(sd | {'a.mystery': torch.zeros(1)})
    assert 'a.mystery' in str(e.value) and len(str(e.value)) < 300


def test_what_a_parent_class_left_over_is_dropped(sd):
    load_official(sd | {'roi_head.bbox_head.0.instance_interactive_conv.norm_in.weight': torch.zeros(64)}, norm_groups=16)


@pytest.mark.parametrize('dialect', ['original', 'detrex', 'transformers'])
def test_deformable_detr_keeps_the_classes_of_coco(dialect):
    torch.manual_seed(0)
    model = create_detector('deformable_detr_tiny', n_classes=91, body='', channels=(4, 6, 8, 10), strategy=Stacked(2))
    twin = load_official(to_official(model, dialect), heads=4, encoder_heads=4, norm_groups=16, dropout=0.)
    assert twin.hyper.n_classes == 80
    person = [m.decoder.steps[0].cls.weight[i] for m, i in ((twin, 0), (model, 1))]   # a person is number 1
    assert torch.equal(*person)


def test_other_checkpoints_are_refused_by_name():
    layer = {'fc.weight': torch.zeros(1)}
    with pytest.raises(KeyError, match='no keys of Deformable DETR'): load_official(layer | {'fc.bias': torch.zeros(1)})
    with pytest.raises(KeyError, match="there are 'fc.weight'"): load_official(layer)


@pytest.mark.parametrize('name', ['sparse_rcnn_r50_100', 'sparse_rcnn_r50_300', 'deq_sparse_rcnn_r50_300', 'deqdet_swins_2x',
                                  'adamixer_r50_1x', 'deqdet_r101_2x', 'ffndet_r50_1x'])
def test_a_full_size_checkpoint_says_what_it_is(name):
    with torch.device('meta'): keys = to_official(published(name).hyper.build())
    assert (infer_sparse if 'sparse' in name else infer)(keys) == published(name).hyper
    if name == 'deqdet_swins_2x':
        count = lambda part: sum(k.startswith(part + '.') for k in keys)
        assert [count(part) for part in ('backbone', 'roi_head', 'neck', 'rpn_head')] == [357, 66, 10, 2]


@pytest.mark.parametrize('strategy', [Settled(), Shared()])
def test_an_equilibrium_deformable_detr_has_no_published_form(strategy):
    "It was an AttributeError"
    hyper = replace(published('deq_deformable_detr_tiny').hyper, strategy=strategy)
    stack = replace(hyper, strategy=Stacked(2)).build()
    with pytest.raises(ValueError, match='a published Deformable DETR has a stack of steps'): to_official(hyper.build())
    with pytest.raises(ValueError, match='a stack of steps'): load_official(to_official(stack), strategy=strategy)
