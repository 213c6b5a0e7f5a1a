"Every key and shape of every published configuration, both ways; and the initialisation of a fresh model"
import gzip
import json
import math
import pytest
import torch
from deqdet.convert import from_official, infer, infer_sparse, layout_of, load_official, original_sparse, to_official
from deqdet.zoo import create_detector, list_detectors, published
from pairs import HERE

KEYS = json.loads(gzip.decompress((HERE/'full_size_keys.json.gz').read_bytes()))
NAMES = dict(deqdet_r50_1x_100q='deqdet_r50_1x', deqdet_r50_2x_300q='deqdet_r50_2x', deqdet_swins_2x_300q='deqdet_swins_2x', deqdet_r101_2x_300q='deqdet_r101_2x',
             ffndet_r50_1x_100q='ffndet_r50_1x', adamixer_r50_1x_100q='adamixer_r50_1x', adamixer_r50_3x_300q='adamixer_r50_3x', adamixer_swin_s_3x_300q='adamixer_swins_3x')
MIXERS = [k for k in KEYS if not k.startswith('mmdet_')]


def checkpoint(config):
    with torch.device('meta'): return {k: torch.empty(s) for k, s in KEYS[config].items()}


@pytest.mark.parametrize('config', MIXERS)
def test_all_keys_map_both_ways(config):
    sd = checkpoint(config)
    hyper = infer(sd)
    with torch.device('meta'): model = hyper.build()
    ours = from_official(sd, model, layout_of(hyper))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    back = to_official(model)
    unused = {k for k in sd if 'instance_interactive_conv' in k}
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in sd.items() if k not in unused}
    name = NAMES.get(config.split(' ')[0])
    if name: assert hyper == published(name).hyper


@pytest.mark.parametrize('config', ['deqdet_r50_1x_100q', 'deqdet_swins_2x_300q'])
def test_a_full_checkpoint_goes_round_bit_for_bit(config):
    g = torch.Generator().manual_seed(0)
    sd = {k: torch.randn(s, generator=g) if s else torch.tensor(7) for k, s in KEYS[config].items() if 'instance_interactive_conv' not in k and 'relative_position_index' not in k}
    hyper = infer(sd)
    with torch.device('meta'): model = hyper.build()
    model.to_empty(device='cpu').load_state_dict(from_official(sd, model, layout_of(hyper)))
    back = to_official(model)
    assert all(torch.equal(back[k], v) for k, v in sd.items())


@pytest.mark.parametrize('config', [k for k in KEYS if k.startswith('mmdet_sparse_rcnn')])
def test_sparse_rcnn_maps_both_ways(config):
    sd = checkpoint(config)
    hyper = infer_sparse(sd)
    assert hyper == published(f'sparse_rcnn_r50_{hyper.n_queries}').hyper
    with torch.device('meta'): model = hyper.build()
    assert {k: v.shape for k, v in from_official(sd, model, layout_of(hyper)).items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in to_official(model).items()} == {k: v.shape for k, v in sd.items()}


@pytest.mark.parametrize('name, as_', [('sparse_rcnn_r50_100', None), ('sparse_rcnn_r50_100', 'original'), ('deq_sparse_rcnn_r50_300', None),
                                       ('deformable_detr_r50', 'original'), ('deformable_detr_r50_refine', 'detrex'), ('deformable_detr_r50_two_stage', 'transformers')])
def test_one_call_loads_every_family(name, as_):
    torch.manual_seed(0)
    model = create_detector(name, n_classes=5, width=32, hidden=48)
    sparse = name.split('_detr')[0] != 'deformable'
    layout = original_sparse(model.hyper) if sparse and as_ else None if sparse else as_
    twin = load_official({'state_dict': to_official(model, layout)}, **({} if sparse else dict(n_queries=300)))
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items() if k != 'queries.boxes')
    assert type(twin.hyper) is type(model.hyper) and type(twin.hyper.strategy) is type(model.hyper.strategy)


def test_every_name_of_the_zoo_has_a_recipe():
    from deqdet.learner import recipes
    assert {published(n).recipe for n in list_detectors()} <= set(recipes)


def test_every_name_of_the_zoo_builds():
    for name in list_detectors():
        with torch.device('meta'): assert sum(p.numel() for p in create_detector(name).parameters()) > 0


def test_a_fresh_model_is_initialised_as_published():
    stats = json.loads((HERE/'init_stats.json').read_text())
    torch.manual_seed(0)
    model = create_detector('deqdet_r50_1x', body='', channels=(256, 512, 1024, 2048))
    layout, seen = layout_of(model.hyper), set()
    for k, v in model.state_dict().items():
        key, v = layout.key(k), v.float()
        want = stats['stats'][key]
        seen.add(key)
        assert list(v.shape) == want['shape']
        n, width = v.numel(), max(abs(want['min']), abs(want['max']), 1e-12)
        assert abs(v.mean().item() - want['mean']) <= 6*want['std']*math.sqrt(2/n) + 1e-6, key
        assert abs(v.std(correction=0).item() - want['std']) <= 6*want['std']/math.sqrt(n) + 1e-6, key
        spread = .35 if n < 100 else .02 if 'content' not in k else .2   # extremes of few numbers, and of a normal, vary
        assert v.abs().max().item() <= width*(1 + spread) + 1e-6, key
    assert {k for k, s in stats['stats'].items() if not s['unused']} == seen
    offsets = model.decoder.init.sampler.offsets.bias.view(4, 64, 3)
    assert torch.allclose(offsets[0, :10], torch.tensor(stats['offset_bias_in_points_64_group0_first_10'])) and torch.equal(offsets[0], offsets[3])
