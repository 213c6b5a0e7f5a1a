"Losses and gradients of Deformable DETR beside transformers' own, where that is installed (it is no dependency)"
import pytest
import torch
from torchvision.ops import box_convert
from deqdet.data import Target
from deqdet.deformable import deformable_keys
from deqdet.loss import SetLoss
from pairs import load_pair, reference_pairs
from test_deformable_parity import detector, maps

tf = pytest.importorskip('transformers')
if tf.__version__ >= '5': pytest.skip('written for transformers 4', allow_module_level=True)
SAME = ('d_model', 'encoder_layers', 'decoder_layers', 'encoder_attention_heads', 'decoder_attention_heads', 'encoder_ffn_dim', 'decoder_ffn_dim',
        'encoder_n_points', 'decoder_n_points', 'num_feature_levels', 'num_queries', 'two_stage', 'two_stage_num_proposals', 'with_box_refine', 'num_labels')


def pytest_generate_tests(metafunc):
    paths = reference_pairs(metafunc.config, 'deformable')
    metafunc.parametrize('pair', [load_pair(p) for p in paths], ids=[f'{p.parent.name}-{p.stem}' for p in paths])


def theirs(pair):
    "transformers' model with the pair's weights; their loss takes the class term once, ours twice unless told"
    c, b = pair.manifest['config'], pair.manifest['config']['backbone']
    body = tf.ResNetConfig(embedding_size=b['embedding_size'], hidden_sizes=b['hidden_sizes'], depths=b['depths'], layer_type='basic', out_features=b['out'])
    model = tf.DeformableDetrForObjectDetection(tf.DeformableDetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=body, auxiliary_loss=True, class_cost=2, **{k: c[k] for k in SAME}))
    assert not model.load_state_dict(pair.sd, strict=False).unexpected_keys
    return model.eval()


def test_loss_and_gradients(pair):
    torch.manual_seed(0)
    boxes = [torch.rand(n, 4)*torch.tensor([.3, .3, .4, .4]) + torch.tensor([.3, .3, .1, .1]) for n in (3, 2)]
    labels = [torch.randint(pair.manifest['config']['num_labels'], (n,)) for n in (3, 2)]
    x, mask = pair.t['in/pixel_values'], pair.t['in/pixel_mask']
    other = theirs(pair)
    out = other(pixel_values=x, pixel_mask=mask, labels=[dict(class_labels=l, boxes=b) for l, b in zip(labels, boxes)])
    out.loss.backward()
    sizes = torch.stack([mask[:, :, 0].sum(1), mask[:, 0].sum(1)], -1)
    model, pad = detector(pair), torch.nn.utils.rnn.pad_sequence
    feats = model.pyramid.encode(model.pyramid.levels.neck(maps(pair)), sizes, mask.shape[-2:])
    corners = [box_convert(b, 'cxcywh', 'xyxy')*s for b, s in zip(boxes, sizes.flip(-1).repeat(1, 2))]
    target = Target(pad(corners, batch_first=True), pad(labels, batch_first=True, padding_value=-1), sizes, torch.arange(2))
    loss = SetLoss(form='cxcywh', w_cls=1.)(model.decoder(model.queries(sizes, feats), feats), target)
    loss.backward()
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    grads = {k: p.grad for k, p in other.named_parameters(remove_duplicate=False)}
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, (ours, third) in deformable_keys(model, 'transformers').items():
        if grads.get(name) is None: continue  # proposals: transformers gives them no loss
        g = own[ours].grad if third is None else own[ours].grad.chunk(3)[third]
        assert (g - grads[name]).abs().max() <= 3e-5*grads[name].abs().max() + 1e-6, name
