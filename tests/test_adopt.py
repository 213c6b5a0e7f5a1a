"A detector takes over from another one: classes by name, queries, whatever fits, in every family"
import copy, pytest, torch
from dataclasses import replace
from deqdet.families.adopt import adopt
from deqdet.zoo import create_detector, published

SHAPES = ['disc', 'triangle', 'square', 'cross']
ROWS = 'decoder.init.cls.3', 'decoder.step.cls.3'

@pytest.fixture(scope='module')
def old():
    torch.manual_seed(0)
    model = create_detector('deqdet_tiny', vocab=SHAPES)
    for k, p in model.named_parameters(): # classes differ in their bias too, as after a training
        if k.endswith('cls.3.bias'): torch.nn.init.normal_(p, -4.)
    return model

def rows(model, k): return model.state_dict()[f'{k}.weight'], model.state_dict()[f'{k}.bias']

@pytest.mark.parametrize('vocab', [['cross', 'cat', 'disc'], ['cat', 'square', 'dog', 'disc']]) # as many as there are, too
def test_known_classes_keep_their_rows_and_new_ones_begin_at_the_mean(old, vocab):
    said = []
    new = adopt(old, vocab, said.append)
    for k in ROWS:
        for theirs, mine in zip(rows(old, k), rows(new, k)):
            for i, name in enumerate(vocab):
                if name in SHAPES: assert torch.equal(mine[i], theirs[SHAPES.index(name)])
                else: torch.testing.assert_close(mine[i], theirs.mean(0), atol=.1, rtol=0)
    known, strange = ([c for c in vocab if (c in SHAPES)==k] for k in (True, False))
    assert said[0].endswith(f"; known classes: {', '.join(known)}; new: {', '.join(strange)}")
    assert '4 tensors start afresh' in said[0]

def test_the_same_classes_in_another_order_are_all_kept(old):
    said = []
    new = adopt(old, SHAPES[::-1], said.append)
    assert said == []
    for k in ROWS:
        for theirs, mine in zip(rows(old, k), rows(new, k)): assert torch.equal(mine, theirs.flip(0))

def test_new_classes_are_not_all_alike(old):
    weight = rows(adopt(old, ['cat', 'dog'], lambda s: None), ROWS[0])[0]
    assert (weight[0]-weight[1]).abs().max() > 1e-4

def test_without_names_classes_are_known_by_place():
    nameless = create_detector('deqdet_tiny', n_classes=4)
    new = adopt(nameless, SHAPES, lambda s: None)
    for k in ROWS: assert torch.equal(rows(new, k)[0], rows(nameless, k)[0])

@pytest.mark.parametrize('name', ['sparse_rcnn_tiny', 'deformable_detr_tiny', 'sqr_adamixer_tiny', 'adamixer_tiny'])
def test_in_every_family(name):
    "An object of a known class has the scores that it had"
    torch.manual_seed(0)
    old = create_detector(name, vocab=SHAPES).eval()
    new = adopt(old, ['cat', 'cross'], lambda s: None).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): a, b = (m(images)[-1].logits for m in (old, new))
    torch.testing.assert_close(b[..., 1], a[..., 3])

def test_many_classes_are_told_in_short(old):
    said = []
    adopt(old, ['disc', *'abcdefg'], said.append)
    assert said[0].endswith('known classes: disc; new: a, b, c, … (7)')

def test_the_new_detector_is_on_the_device_of_the_old_one(old):
    "Names of tensors that are on another device were mixed with new ones on the CPU; `meta` stands for a GPU"
    there = copy.deepcopy(old).to('meta')
    new = adopt(there, ['cross', 'cat'], lambda line: None)
    assert {p.device.type for p in new.parameters()}=={'meta'}

def test_proposals_of_two_stages_are_kept_whatever_the_classes(old):
    "Their first class means an object of any class; its row went to the class that took the first place"
    hyper = replace(published('deformable_detr_tiny').hyper, two_stage=True, n_classes=4)
    theirs = hyper.build(vocab=SHAPES)
    torch.nn.init.normal_(theirs.queries.cls.bias)
    for vocab in (SHAPES[::-1], ['cat', 'disc']):
        mine = adopt(theirs, vocab, lambda line: None)
        for a, b in zip(theirs.queries.cls.parameters(), mine.queries.cls.parameters()): assert torch.equal(a[:2], b[:2])
