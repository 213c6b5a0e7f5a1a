"A detector: its answer, its modes, every hyper-parameter, how it is fed, kept and read again"
import copy, json
from dataclasses import asdict, replace
import pytest, torch
from torch import nn
from torch.testing import assert_close
from deqdet.decoder import Stacked
from deqdet.equilibrium import Perturb, Settled
from deqdet.families.adamixer import AdaMixer
from deqdet.model import Detector, Features, Feed, evaluating, from_dict, named_body, residual_trace, to_dict
from deqdet.ops.errors import CommandError
from deqdet.zoo import deqdet_tiny, deformable_tiny, sparse_rcnn_tiny

SIZES = torch.tensor([[128, 128], [120, 100]])
SMALL = AdaMixer(n_classes=4, body='tiny', feat_width=64, norm_groups=8, n_queries=12, grid=(3, 4, .4), width=64, heads=4,
                 points=(8,), out_points=16, hidden=128,
                 strategy=Settled(steps=4, supervise=(1, 4), perturb=Perturb(position=3.)))


@pytest.fixture(scope='module')
def images(): return torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return deqdet_tiny.build(vocab=['disc']*80).eval()


@pytest.fixture
def stack():
    "A stack of three steps whose heads and points are not those of a fresh one"
    torch.manual_seed(0)
    return stirred(replace(SMALL, strategy=Stacked(3)).build()).eval()


def stirred(model):
    "Boxes move and points lie apart, as they do after training"
    for name, p in model.named_parameters():
        if name.endswith(('reg.3.weight', 'offsets.weight')): nn.init.normal_(p, std=.05)
    return model


# ---------------------------------------------------------------------------------------------------------- answers

def test_a_list_of_predictions(stack, images):
    preds = stack(images, SIZES)
    assert len(preds) == 3
    assert preds[-1].logits.shape == (2, 12, 4) and preds[-1].boxes.shape == (2, 12, 4)


def test_without_sizes_there_is_no_padding(stack, images):
    whole = torch.tensor([[128, 128], [128, 128]])
    assert_close(stack(images)[-1].boxes, stack(images, whole)[-1].boxes)


def test_two_images_of_one_size_do_not_see_each_other(stack, images):
    sizes = torch.tensor([[128, 128], [128, 128]])
    both = stack(images, sizes)[-1]
    for i in range(2):
        alone = stack(images[i:i+1], sizes[i:i+1])[-1]
        assert_close(alone.boxes[0], both.boxes[i], atol=1e-3, rtol=0)
        assert_close(alone.logits[0], both.logits[i], atol=1e-4, rtol=0)


def test_predict_in_original_pixels_by_size_or_by_scale(stack, images):
    stack.train()
    dets = stack.predict(images, SIZES, orig=2*SIZES, max_dets=5)
    assert stack.training
    assert [d['boxes'].shape for d in dets] == [(5, 4)]*2
    fed = stack.predict(images, SIZES, max_dets=5)
    by_scale = stack.predict(images, SIZES, scale=torch.full((2, 2), .5), max_dets=5)
    for d, f, s in zip(dets, fed, by_scale, strict=True):
        assert_close(d['boxes']/2, f['boxes'], atol=1e-4, rtol=0)
        assert_close(d['boxes'], s['boxes'])


def test_predict_is_best_first_and_leaves_out_low_scores(stack, images):
    dets = stack.predict(images, SIZES)
    for d in dets: assert d['scores'].diff().max() <= 0
    assert [len(d['boxes']) for d in stack.predict(images, SIZES, min_score=.99)] == [0, 0]
    assert len(dets[0]['scores']) == 12*4 # fewer pairs than `max_dets`


@pytest.mark.parametrize('steps', [None, 2, 5])
def test_a_trajectory_has_every_step(stack, images, steps):
    stack.train()
    assert len(stack.trajectory(images, SIZES, steps=steps)) == (steps or 3)
    assert stack.training


def test_residual_trace_is_the_change_from_state_to_state(stack, images):
    trace = residual_trace(stack, (images, SIZES), steps=5)
    path = stack.trajectory(images, SIZES, steps=5)
    assert trace.rel.shape == trace.abs.shape == (4, 2, 2)
    for t, ((a, _), (b, _)) in enumerate(zip(path, path[1:])):
        for image in range(2):
            assert_close(trace.abs[t, image, 1], (b.boxes - a.boxes)[image].norm(), atol=1e-3, rtol=1e-4)


def test_parts_compile_to_one_graph_each_and_names_stay(stack, images):
    "Torch 2.6 breaks the graph where a step reads `state.boxes`, a property of a named tuple"
    one_graph = not torch.__version__.startswith('2.6.')
    fast = copy.deepcopy(stack).compile(backend='eager', fullgraph=one_graph)
    for a, b in zip(fast.trajectory(images, SIZES), stack.trajectory(images, SIZES), strict=True):
        assert_close(a[1].boxes, b[1].boxes, atol=1e-3, rtol=0)
    assert list(fast.state_dict()) == list(stack.state_dict())


# ------------------------------------------------------------------------------------------------- hyper-parameters

CHANGES = [dict(n_classes=7), dict(neck_kernel=1), dict(neck_act=False), dict(feat_width=32), dict(norm_groups=4),
           dict(n_queries=6, grid=(2, 3, .4)), dict(grid=()), dict(width=32), dict(heads=2), dict(groups=2), dict(points=(9,)),
           dict(points=(8, 4)), dict(out_points=8), dict(hidden=64), dict(strides=(8, 16, 32, 64)), dict(strategy=Settled(extra=3))]


def answer(hyper, images):
    torch.manual_seed(0)
    model = stirred(hyper.build()).eval()
    with torch.no_grad(): return sum(p.numel() for p in model.parameters()), model(images, SIZES)[-1].boxes.mean().item()


@pytest.fixture(scope='module')
def published_answer(images): return answer(SMALL, images)


def test_the_same_record_gives_the_same_detector(images, published_answer): assert answer(SMALL, images) == published_answer


@pytest.mark.parametrize('change', CHANGES, ids=str)
def test_every_field_changes_the_parameters_or_the_answer(images, published_answer, change):
    assert answer(replace(SMALL, **change), images) != published_answer


def test_a_variant_is_a_replace(images):
    with pytest.raises(TypeError, match='n_querys'): replace(SMALL, n_querys=3)
    assert replace(SMALL, n_queries=20, grid=()).build()(images, SIZES)[-1].boxes.shape == (2, 20, 4)
    assert len(replace(SMALL, strategy=Stacked(6)).build()(images, SIZES)) == 6


@pytest.mark.parametrize('body, weights', [('tiny', False), ('', False), ('resnet50.tv_in1k', True)])
def test_which_bodies_may_come_with_weights(body, weights): assert replace(SMALL, body=body).has_weights == weights


def test_a_name_gives_a_body():
    assert named_body('tiny').channels == (32, 64, 128, 192)
    assert len(named_body('resnet18.tv_in1k', frozen_stages=-1).channels) == 4


def test_without_a_body_features_are_fed():
    hyper = replace(SMALL, body='', channels=(8, 8, 8, 8))
    model = hyper.build()
    assert type(model.pyramid) is Features
    feats = [torch.randn(2, 8, 128//s, 128//s) for s in (4, 8, 16, 32)]
    assert model(feats, SIZES)[-1].boxes.shape == (2, 12, 4)


# ------------------------------------------------------------------------------------------------------------ feed

@pytest.mark.parametrize('text, feed', [('128', Feed(128, 128)), (640, Feed(640, 640)), ('800x1333', Feed(800, 1333)),
                                        ('1333x800', Feed(800, 1333))])
def test_feed_is_read_from_text(text, feed): assert Feed.parse(text) == feed


@pytest.mark.parametrize('text', ['', '0', '0x5', '5x0', 'big', '1x2x3', '-5', '12.5', '8 x 9', None])
def test_feed_refuses_other_text(text):
    with pytest.raises(ValueError, match='pixels of the long side were expected, as 640, or of both, as 800x1333'): Feed.parse(text)


def test_a_folder_says_how_its_detector_is_fed(model, tmp_path):
    model.feed = Feed(96, 128)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path/'config.json').read_text())['feed'] == dict(short=96, long=128)
    assert Detector.from_pretrained(tmp_path).feed == Feed(96, 128)


def test_a_detector_without_a_feed_stays_without(model, tmp_path):
    model.feed = None
    model.save_pretrained(tmp_path)
    assert Detector.from_pretrained(tmp_path).feed is None


def test_an_older_folder_has_its_feed_in_a_file(model, tmp_path):
    model.feed = None
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    del config['feed'], config['recipe'] # which older folders did not have
    (tmp_path/'config.json').write_text(json.dumps(config))
    assert Detector.from_pretrained(tmp_path).feed is None
    (tmp_path/'feed.json').write_text(json.dumps(asdict(Feed(48, 64))))
    assert Detector.from_pretrained(tmp_path).feed == Feed(48, 64)
    (tmp_path/'feed.json').write_text('{"width": 3}')
    with pytest.raises(CommandError, match='width'): Detector.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------------- records

@pytest.mark.parametrize('hyper, old', [(sparse_rcnn_tiny, 'deqdet.sparse_rcnn.SparseRCNN'),
                                        (deformable_tiny, 'deqdet.deformable.DeformableDETR'),
                                        (deqdet_tiny, 'deqdet.model.AdaMixer')])
def test_records_that_moved_are_found_by_their_old_name(hyper, old):
    now = to_dict(hyper)
    assert from_dict(now | {'is': old}) == hyper == from_dict(json.loads(json.dumps(now)))


@pytest.mark.parametrize('name', ['os.system', 'deqdet.model.json', 'deqdet.model.Nothing', 'builtins.dict', 'Feed'])
def test_nothing_but_a_record_of_deqdet_is_made(name):
    with pytest.raises(ValueError, match=f"'{name}' is no record of deqdet"): from_dict({'is': name})


def test_a_whole_detector_comes_back(images, tmp_path):
    model = stirred(SMALL.build(vocab=['disc', 'triangle', 'square', 'cross'])).eval()
    model.recipe = 'tiny'
    folder = model.save_pretrained(tmp_path/'small')
    assert sorted(f.name for f in folder.iterdir()) == ['config.json', 'model.safetensors']
    same = Detector.from_pretrained(folder)
    assert not same.training
    assert (same.vocab, same.recipe, same.hyper) == (['disc', 'triangle', 'square', 'cross'], 'tiny', SMALL)
    assert torch.equal(same(images, SIZES)[-1].logits, model(images, SIZES)[-1].logits)


def test_thresholds_of_classes_come_back_and_count(stack, images, tmp_path):
    "Without a score each class has its own bar; without thresholds it is .3"
    assert stack.thresholds is None
    every = stack.predict(images, SIZES)
    stack.thresholds = [0., *[2.]*(stack.hyper.n_classes-1)]
    same = Detector.from_pretrained(stack.save_pretrained(tmp_path/'kept'))
    assert same.thresholds == stack.thresholds
    for d,some in zip(every, same.predict(images, SIZES, min_score=None)):
        assert len(some['labels']) == (d['labels']==0).sum() > 0
        assert set(some['labels'].tolist()) == {0}
    same.thresholds = None
    bar = [d['scores'] >= .3 for d in every]
    assert [len(d['scores']) for d in same.predict(images, SIZES, min_score=None)] == [int(b.sum()) for b in bar]


def test_only_what_a_record_built_can_be_saved(stack, tmp_path):
    with pytest.raises(ValueError, match='not built from hyper-parameters'):
        Detector(stack.pyramid, stack.queries, None).save_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------ mode

@pytest.mark.parametrize('mode', [True, False])
def test_evaluating_restores_the_mode(mode):
    net = nn.Sequential(nn.Dropout()).train(mode)
    with evaluating(net) as inside:
        assert inside is net and not net.training and not net[0].training and not torch.is_grad_enabled()
    assert net.training == net[0].training == mode and torch.is_grad_enabled()
    with pytest.raises(KeyError):
        with evaluating(net): raise KeyError
    assert net.training == mode
