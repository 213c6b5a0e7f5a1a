"Every key and shape of every published configuration, both ways; and the initialisation of a fresh model"
import gzip
import json
import math
import pytest
import torch
from deqdet.convert import from_official, infer, layout_of, to_official
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
