"Deformable DETR against numbers of published code: encoder, proposals, references, contents, logits, boxes, and the names of checkpoints"
import re
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert
from deqdet.checkpoints.dialects import DIALECTS, deformable_keys, dialect_of, infer_deformable, load_deformable, publish_deformable
from deqdet.families.deformable_attention import map_embedding
from pairs import load_pair, reference_pairs

CONTENT, LOGITS, BOXES = 1e-4, 5e-5, 1e-5  # absolute; boxes as fractions of the picture
BODY = 'model.backbone.conv_encoder.model.'


def pytest_generate_tests(metafunc):
    paths = reference_pairs(metafunc.config, 'deformable')
    metafunc.parametrize('pair', [load_pair(p) for p in paths], ids=[f'{p.parent.name}-{p.stem}' for p in paths])


def maps(pair):
    "What the pair's body gives: a ResNet of basic blocks, under the names that transformers has for it"
    sd = pair.sd

    def conv(x, name, stride=1):
        w, norm = sd[f'{BODY}{name}.convolution.weight'], f'{BODY}{name}.normalization.'
        x = F.conv2d(x, w, stride=stride, padding=w.shape[-1]//2)
        return F.batch_norm(x, *(sd[norm + k] for k in ('running_mean', 'running_var', 'weight', 'bias')))
    x = F.max_pool2d(F.relu(conv(pair.t['in/pixel_values'], 'embedder.embedder', 2)), 3, 2, 1)
    found = []
    for s, depth in enumerate(pair.manifest['config']['backbone']['depths']):
        for b in range(depth):
            name, stride = f'encoder.stages.{s}.layers.{b}.', 2 if s and not b else 1
            y = conv(F.relu(conv(x, name + 'layer.0', stride)), name + 'layer.1')
            x = F.relu(y + (conv(x, name + 'shortcut', stride) if f'{BODY}{name}shortcut.convolution.weight' in sd else x))
        found.append(x)
    return found


def detector(pair):
    "The pair's weights through the converter, without its body; heads and queries leave no trace in shapes"
    c, sd = pair.manifest['config'], {k: v for k, v in pair.sd.items() if not k.startswith(BODY)}
    known = dict(heads=c['decoder_attention_heads'], encoder_heads=c['encoder_attention_heads'], n_queries=c['num_queries'])
    return load_deformable(infer_deformable(sd, **known).build().eval(), sd, 'transformers')


def near(ours, theirs, tol, what):
    worst = (ours - theirs).abs().max().item()
    assert ours.shape == theirs.shape and worst <= tol, f'{what}: {worst:.2e} > {tol:.0e}'


def fractions(boxes, sizes): return box_convert(boxes, 'xyxy', 'cxcywh')/sizes.flip(-1).repeat(1, 2)[:, None]


@torch.no_grad()
def test_forward(pair):
    "Everything between the body's maps and the answer"
    c, t, model = pair.manifest['config'], pair.t, detector(pair)
    mask = t['in/pixel_mask'].bool()
    sizes = torch.stack([mask[:, :, 0].sum(1), mask[:, 0].sum(1)], -1)
    feats = model.pyramid.encode(model.pyramid.levels.neck(maps(pair)), sizes, mask.shape[-2:])
    memory, _, *masks = feats
    for i, m in enumerate(masks): near(map_embedding(m, c['d_model']).permute(0, 3, 1, 2)*m[:, None], t[f'pos/{i}']*m[:, None], 1e-5, f'pos/{i}')
    shown = torch.cat([m.flatten(1) for m in masks], 1)
    near(memory[shown], t['out/encoder_last_hidden_state'][shown], CONTENT, 'encoder')
    state = model.queries(sizes, feats)
    if c['two_stage']:
        first, ref = model.queries.preds(feats)[0], fractions(state.boxes, sizes)
        near(first.logits, t['out/enc_outputs_class'], LOGITS, 'class of proposals')
        near(fractions(first.boxes, sizes), t['out/enc_outputs_coord_logits'].sigmoid(), BOXES, 'boxes of proposals')
    else: ref = model.decoder.steps[0].start(state, sizes)[..., :2]
    near(ref, t['out/init_reference_points'], BOXES, 'first references')
    for i, (z, pred) in enumerate(model.decoder.trajectory(state, feats)):
        near(z.content, t['out/intermediate_hidden_states'][:, i], CONTENT, f'content {i}')
        if c['with_box_refine']: near(fractions(z.boxes, sizes), t['out/intermediate_reference_points'][:, i], BOXES, f'reference {i}')
    near(pred.logits, t['out/logits'], LOGITS, 'logits')
    near(fractions(pred.boxes, sizes), t['out/pred_boxes'], BOXES, 'boxes')


def test_names_of_the_original(pair):
    "The original repository's names and those of transformers stand for the same tensors, as the pair says"
    listed = pair.manifest.get('official_key_to_hf_key')
    if listed is None: pytest.skip('this pair does not list the names of the original repository')
    model = detector(pair)
    original, hf = (deformable_keys(model, d) for d in ('original', 'transformers'))
    for theirs, names in listed.items():
        names = names if isinstance(names, list) else [names]
        assert [hf[n] for n in names] == [(original[theirs][0], i if len(names) > 1 else None) for i in range(len(names))], theirs
    assert set(original) == set(listed)


@pytest.mark.parametrize('dialect', DIALECTS)
def test_round_trip(pair, dialect):
    "Through every dialect and back, bit by bit"
    model = detector(pair)
    sd = publish_deformable(model, dialect)
    assert dialect_of(sd) == dialect
    hyper = infer_deformable(sd, **{k: getattr(model.hyper, k) for k in ('heads', 'encoder_heads', 'n_queries')})
    assert hyper == model.hyper
    again = load_deformable(hyper.build(), sd, dialect).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items() if not re.search('num_batches_tracked', k))
