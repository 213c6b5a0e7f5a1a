"Bodies, necks and pyramids: what is too slow, too long or too numerous for the notebook"
import copy, json, math, pickle
from pathlib import Path
import pytest, timm, torch, torch.nn.functional as F
from safetensors.torch import load_file
from timm.models import FeatureListNet
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
import deqdet.backbone, deqdet.ops.weights
from deqdet.backbone import (MEAN, STD, Body, Neck, PaddedBlock, Pyramid, create_body, four_levels, freeze, inside,
    pad_first, tiny_body)

REFERENCE = Path(__file__).parent/'parity'/'reference'
SWIN = 'swin_tiny_patch4_window7_224'
SMALL = dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))

def count(module): return sum(p.numel() for p in module.parameters())
def close(a, b, eps=1e-5): return (a - b).abs().max().item() < eps
def change(a, b): return ((a - b).norm()/b.norm()).item()
def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

@pytest.fixture(scope='module')
def resnet():
    "A small ResNet of which every layer matters, with BatchNorm statistics of the images that it will see"
    torch.manual_seed(1)
    net = ResNet(BasicBlock, [1, 1, 1, 1], channels=(32, 64, 128, 192), num_classes=0, zero_init_last=False)
    net = FeatureListNet(net, out_indices=(1, 2, 3, 4)).train()
    with torch.no_grad():
        for i in range(40): net(noise(4, 3, 64, 64, seed=i))
    return net

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
    "Images to levels, backward and a step: frozen weights and all statistics stay, the rest moves; frozen parts build no graph"
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

# how a body wants its images

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

def test_backbone_does_not_import_fastai(loaded): assert 'timm' in loaded['backbone'] and 'fastai' not in loaded['backbone']

# which levels a network has

def test_the_levels_are_found_by_their_strides():
    assert four_levels([2, 4, 8, 16, 32]) == [1, 2, 3, 4] and four_levels([4, 8, 16, 32]) == [0, 1, 2, 3]

def test_a_network_without_the_four_strides_is_refused():
    with pytest.raises(ValueError, match=r'strides \(4, 8, 16, 32\); this one has \(16, 16, 16\)'): four_levels([16, 16, 16])

# freezing

def test_train_undoes_what_eval_did_to_a_part(resnet):
    net = copy.deepcopy(resnet)
    net.bn1.eval()
    assert not net.bn1.training
    net.train()
    assert net.bn1.training   # the freezing is gone

def test_a_frozen_module_is_in_eval_mode_and_leaves_nothing_to_differentiate():
    layer = freeze(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert not layer.training and not any(p.requires_grad for p in layer.parameters())
    assert not layer(torch.ones(1, 3)).requires_grad

def test_modes_of_a_body_in_training(resnet):
    "Stem and first stage in eval mode, every BatchNorm on stored statistics, the affine weights of later ones learn"
    body = Body(copy.deepcopy(resnet), frozen_stages=1, norm_eval=True).train()
    assert body.training and body.net.layer2.training
    assert not any(m.training for m in body.modules() if isinstance(m, nn.BatchNorm2d))
    assert not body.net.conv1.training and not body.net.layer1.training
    assert {n.split('.')[0] for n, p in body.net.named_parameters() if p.requires_grad} == {'layer2', 'layer3', 'layer4'}
    assert body.net.layer2[0].bn1.weight.requires_grad

def test_unfreezing_from_outside_lasts_until_train(resnet):
    body = Body(copy.deepcopy(resnet), frozen_stages=1, norm_eval=True).requires_grad_(True)
    assert body.net.conv1.weight.requires_grad
    body.train()
    assert not body.net.conv1.weight.requires_grad and body.net.layer2[0].conv1.weight.requires_grad

def test_frozen_parts_build_no_graph(resnet):
    body = Body(copy.deepcopy(resnet), frozen_stages=1, norm_eval=True)
    feats = body(noise(2, 3, 64, 64))
    assert [f.requires_grad for f in feats] == [False, True, True, True]
    feats[3].sum().backward()
    assert body.net.conv1.weight.grad is None and body.net.layer4[0].conv1.weight.grad.norm() > 0

def test_tiny_body_learns_all_over():
    tiny = tiny_body()
    assert all(p.requires_grad for p in tiny.parameters()) and all(m.training for m in tiny.modules())

# Swin

ANY = dict(features_only=True, strict_img_size=False, drop_path_rate=0., **SMALL)

def test_padding_first_changes_nothing_where_nothing_is_padded():
    torch.manual_seed(0)
    plain = timm.create_model(SWIN, always_partition=True, **ANY).eval()
    swin = pad_first(copy.deepcopy(plain))
    x = noise(1, 3, 224, 224)                                         # multiples of 7 at every level
    with torch.no_grad():
        for a, b in zip(plain(x), swin(x)): assert close(a, b)
        assert change(swin(x[..., :104, :104])[3], plain(x[..., :104, :104])[3]) > .01
        sides = [tuple(f.shape) for f in swin(noise(1, 3, 90, 203))]
    assert sides == [(1, 23, 51, 24), (1, 12, 26, 48), (1, 6, 13, 96), (1, 3, 7, 192)]
    assert [k for k, _ in plain.named_parameters()] == [k for k, _ in swin.named_parameters()]

@pytest.mark.parametrize('always,want', [(False, (0, 0)), (True, (3, 3))])
def test_the_last_stage_shifts_only_where_windows_are_always_made(always, want):
    net = timm.create_model(SWIN, always_partition=always, **ANY)
    assert tuple(net.layers_3.blocks[1].shift_size) == want

def test_output_norms_of_a_swin():
    torch.manual_seed(0)
    body = create_body(SWIN, frozen_stages=-1, out_norm=True, **SMALL).eval()
    with torch.no_grad(): feats = body(noise(1, 3, 64, 200))
    assert [tuple(f.shape) for f in feats] == [(1, c, math.ceil(64/s), math.ceil(200/s)) for c, s in zip(body.channels, body.strides)]
    for f in feats: assert close(f.mean(1), torch.zeros_like(f[:, 0]))
    assert count(body.norms) == 2*sum(body.channels)

def test_paths_are_dropped_in_training_only():
    torch.manual_seed(0)
    swin = create_body(SWIN, frozen_stages=-1, drop_path=.3, **SMALL)
    x = noise(2, 3, 64, 64)
    with torch.no_grad():
        assert change(swin.eval()(x)[3], swin(x)[3]) == 0
        assert change(swin.train()(x)[3], swin(x)[3]) > 0

# what `create_body` refuses

@pytest.mark.parametrize('name,kwargs,says', [
    ('resnet18', dict(nonsense=1), 'nonsense'), ('vit_tiny_patch16_224', {}, r'this one has \(16, 16'),
    ('resnet18.nosuch', {}, 'Invalid pretrained tag'), ('resnet18', dict(frozen_stages=5), 'frozen_stages is 5; expected -1 to 4')])
def test_bodies_that_are_refused(name, kwargs, says):
    with pytest.raises(Exception, match=says): create_body(name, **kwargs)

def test_frozen_parameters_of_the_published_resnet():
    with torch.device('meta'): body = create_body(BODIES['r50'])
    assert sum(p.numel() for p in body.parameters() if not p.requires_grad) == 225_344

# the neck

@pytest.mark.parametrize('channels,kernel,want', [
    ((256, 512, 1024, 2048), 3, 8_848_896), ((96, 192, 384, 768), 3, 3_319_296),
    ((256, 512, 1024, 2048), 1, 984_576), ((96, 192, 384, 768), 1, 370_176)])
def test_parameters_of_the_necks(channels, kernel, want):
    with torch.device('meta'): assert count(Neck(channels, kernel=kernel, act=kernel == 3)) == want

@pytest.fixture
def unequal():
    "Levels of very different scale, as from a Swin without norms"
    return [s*noise(2, c, 32//2**i, 40//2**i, seed=i) for i, (c, s) in enumerate([(24, 1.), (48, .2), (96, .3), (192, .4)])]

def test_the_neck_makes_levels_of_equal_scale(unequal):
    torch.manual_seed(0)
    for f in Neck((24, 48, 96, 192))(unequal):
        assert f.std().item() == pytest.approx(1, abs=.02) and f.mean().item() == pytest.approx(0, abs=.02)

def test_the_neck_treats_pictures_alone_and_ignores_the_scale_of_a_level(unequal):
    torch.manual_seed(0)
    neck = Neck((24, 48, 96, 192))
    out = neck(unequal)
    assert all(change(a[0], b[1]) < 1e-5 for a, b in zip(neck([f[1:] for f in unequal]), out))
    assert all(change(a, b) < 1e-2 for a, b in zip(neck([3*f for f in unequal]), out))   # biases are zero at the start

def test_the_neck_refuses_a_missing_level(unequal):
    with pytest.raises(ValueError, match='shorter'): Neck((24, 48, 96, 192))(unequal[:3])

def test_a_neck_without_activation_is_convolution_and_norm(unequal):
    neck = Neck((24, 48, 96, 192), kernel=1, act=False)
    assert torch.equal(neck.norm(neck.convs[0](unequal[0])), neck(unequal)[0])

def test_initial_weights_of_the_neck_are_xaviers():
    torch.manual_seed(0)
    for conv in Neck((24, 48, 96, 192)).convs:
        bound = math.sqrt(6/(9*(conv.in_channels + 256)))
        assert .99*bound < conv.weight.abs().max() <= bound
        assert not conv.bias.any()

# normalisation and padding

@pytest.fixture
def padded():
    "Two images of different sizes in a batch, and the images"
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=g) for h, w in ((64, 96), (48, 65)))
    return torch.stack([a, F.pad(b, (0, 31, 0, 16))]), torch.tensor([[64, 96], [48, 65]]), a, b

@pytest.fixture
def pyramid(resnet):
    torch.manual_seed(0)
    return Pyramid(Body(copy.deepcopy(resnet)), Neck((32, 64, 128, 192), width=64)).eval()

def test_inside_is_true_on_the_picture():
    want = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]])
    sizes = torch.tensor([[128, 192], [96, 130]])
    assert torch.equal(inside(torch.tensor([[1, 2], [2, 3]]), 2, 3).int(), want)
    assert torch.equal(inside(sizes, 128, 192).sum((1, 2)), sizes.prod(1))

def test_normalise_then_pad_to_the_bit_whatever_is_in_the_padding(pyramid, padded):
    batch, sizes, a, b = padded
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    got = pyramid.normalize(batch, sizes)
    assert torch.equal(got[0], (a - mean)/std)
    assert torch.equal(got[1], F.pad((b - mean)/std, (0, 31, 0, 16)))
    assert torch.equal(pyramid.normalize(a[None]), (a - mean)[None]/std)       # no sizes, no padding
    dirt = torch.randint(0, 255, batch.shape, dtype=torch.uint8)
    noisy = torch.where(inside(sizes, 64, 96)[:, None], batch, dirt)
    assert torch.equal(pyramid.normalize(noisy, sizes), got)
    assert close(pyramid.normalize(batch/255, sizes), got)                     # floats in 0..1

def test_levels_of_a_pyramid_are_a_tuple_of_equal_width(pyramid, padded):
    with torch.no_grad(): levels = pyramid(*padded[:2])
    assert type(levels) is tuple
    assert [tuple(f.shape) for f in levels] == [(2, 64, 64//s, 96//s) for s in pyramid.strides]

def test_under_autocast_normalisation_stays_in_full_precision(pyramid, padded):
    batch, sizes = padded[:2]
    with torch.no_grad():
        want = pyramid(batch, sizes)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert pyramid.normalize(batch, sizes).dtype == torch.float32
            half = pyramid(batch, sizes)
    assert max(change(h.float(), f) for h, f in zip(half, want)) < .05

def test_gradients_reach_what_learns_and_the_checkpoint_holds_weights_only(resnet, padded):
    body = Body(copy.deepcopy(resnet), frozen_stages=1, norm_eval=True)
    p = Pyramid(body, Neck(body.channels, width=32, groups=8)).train()
    sum(f.square().mean() for f in p(*padded[:2])).backward()
    assert {n.split('.')[2] for n, q in p.named_parameters() if q.grad is None} == {'conv1', 'bn1', 'layer1'}
    assert not {'mean', 'std'} & set(p.state_dict())

def test_the_page_of_weights_is_reached_through_this_one():
    for name in ('read_weights', 'load_timm', 'pretrained_net'):
        assert getattr(deqdet.backbone, name) is getattr(deqdet.ops.weights, name) and name in deqdet.backbone.__all__
