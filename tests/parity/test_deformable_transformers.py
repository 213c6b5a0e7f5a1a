"Answers, losses and gradients of Deformable DETR beside transformers' own, 4 or 5, where that is installed (it is no dependency)"
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.ops import box_convert
from deqdet.checkpoints.dialects import deformable_keys
from deqdet.data import Target
from deqdet.loss import SetLoss
from pairs import load_pair, reference_pairs
from test_deformable_parity import BOXES, LOGITS, detector, fractions, maps, near

tf = pytest.importorskip('transformers')
SAME = ('d_model', 'encoder_layers', 'decoder_layers', 'encoder_attention_heads', 'decoder_attention_heads', 'encoder_ffn_dim', 'decoder_ffn_dim',
        'encoder_n_points', 'decoder_n_points', 'num_feature_levels', 'num_queries', 'two_stage', 'two_stage_num_proposals', 'with_box_refine', 'num_labels')


def pytest_generate_tests(metafunc):
    paths = reference_pairs(metafunc.config, 'deformable')
    metafunc.parametrize('pair', [load_pair(p) for p in paths], ids=[f'{p.parent.name}-{p.stem}' for p in paths])


def theirs(pair, folder):
    "transformers' model with the pair's weights, read as it reads published ones: version 5 names its modules differently inside"
    c, b = pair.manifest['config'], pair.manifest['config']['backbone']
    body = tf.ResNetConfig(embedding_size=b['embedding_size'], hidden_sizes=b['hidden_sizes'], depths=b['depths'], layer_type='basic', out_features=b['out'])
    tf.DeformableDetrConfig(use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=body, auxiliary_loss=True,
                            class_cost=2, **{k: c[k] for k in SAME}).save_pretrained(folder)
    save_file({k: v.clone() for k, v in pair.sd.items()}, folder/'model.safetensors', metadata=dict(format='pt'))
    model, said = tf.DeformableDetrForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not said['unexpected_keys'] and not said['missing_keys']
    return model.eval()


def published_gradients(model, folder):
    "Gradients by published name: version 4 names parameters so inside too, version 5 when it saves them"
    if tf.__version__ < '5': return {k: p.grad for k, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.full_like(p, torch.nan) if p.grad is None else p.grad)
    model.save_pretrained(folder)
    return {k: g for k, g in load_file(folder/'model.safetensors').items() if not g.isnan().all()}


def test_loss_and_gradients(pair, tmp_path):
    torch.manual_seed(0)
    boxes = [torch.rand(n, 4)*torch.tensor([.3, .3, .4, .4]) + torch.tensor([.3, .3, .1, .1]) for n in (3, 2)]
    labels = [torch.randint(pair.manifest['config']['num_labels'], (n,)) for n in (3, 2)]
    x, mask = pair.t['in/pixel_values'], pair.t['in/pixel_mask']
    other = theirs(pair, tmp_path/'in')
    out = other(pixel_values=x, pixel_mask=mask, labels=[dict(class_labels=l, boxes=b) for l, b in zip(labels, boxes)])
    out.loss.backward()
    sizes = torch.stack([mask[:, :, 0].sum(1), mask[:, 0].sum(1)], -1)
    model, pad = detector(pair), torch.nn.utils.rnn.pad_sequence
    feats = model.pyramid.encode(model.pyramid.levels.neck(maps(pair)), sizes, mask.shape[-2:])
    corners = [box_convert(b, 'cxcywh', 'xyxy')*s for b, s in zip(boxes, sizes.flip(-1).repeat(1, 2))]
    target = Target(pad(corners, batch_first=True), pad(labels, batch_first=True, padding_value=-1), sizes, torch.arange(2))
    preds = model.decoder(model.queries(sizes, feats), feats)
    near(preds[-1].logits, out.logits, LOGITS, 'logits'); near(fractions(preds[-1].boxes, sizes), out.pred_boxes, BOXES, 'boxes')
    loss = SetLoss(form='cxcywh', w_cls=1.)(preds, target) # transformers' loss takes the class term once, ours twice unless told
    loss.backward()
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    grads = published_gradients(other, tmp_path/'out')
    own, compared = dict(model.named_parameters(remove_duplicate=False)), set()
    for name, (ours, third) in deformable_keys(model, 'transformers').items():
        if name not in grads: continue  # proposals: transformers gives them no loss
        g = own[ours].grad if third is None else own[ours].grad.chunk(3)[third]
        assert (g - grads[name]).abs().max() <= 3e-5*grads[name].abs().max() + 1e-6, name
        compared.add(ours)
    assert {k.split('.')[0] for k in compared} == {'pyramid', 'queries', 'decoder'} and len(compared) > 100
