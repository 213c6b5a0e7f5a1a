"`benchmarks/beyond.py`: first boxes of a dense head, gradients through two moves, groups, layers of low rank"
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from torch import nn
from deqdet.decoder import State
from deqdet.equilibrium import RAG, Settled
from deqdet.ops.states import parts
from deqdet.sets.images import Target
from deqdet.training.denoise import steps_of
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))
import families
import own_data
from dense import dense_loss
from beyond import IDEAS, LookTwice, LowRank, Relation, keep_points, relative, shrunk

ARGS = SimpleNamespace(frozen=3, queries=0)

@pytest.fixture(scope='module')
def batch():
    "Two images of different sizes, with two and one object of two classes"
    torch.manual_seed(0)
    sizes = torch.tensor([[96,128],[128,112]])
    images = torch.randint(0, 255, (2,3,128,128), dtype=torch.uint8)
    boxes = torch.tensor([[[8.,8,40,60],[60,30,120,90]],[[20,20,90,100],[0,0,0,0]]])
    labels = torch.tensor([[0,1],[1,-1]])
    return images, sizes, Target(boxes, labels, sizes, torch.arange(2), sizes)

def detector(kind):
    torch.manual_seed(0)
    return IDEAS[kind](['a','b'], args=ARGS)

@pytest.mark.parametrize('kind', ['first_boxes', 'look_twice', 'groups', 'light', 'no_init', 'no_init_first_boxes', 'related', 'fewer_points', 'rag4', 'seldom_attention', 'sometimes_early', 'random_k'])
def test_every_part_learns(kind, batch):
    own = detector(kind)
    net = own.net.train()
    own.loss(*batch).backward()
    still = [k for k,p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not [k for k in still if '.body.' not in k]
    found = own.detect(*batch)
    assert all(torch.isfinite(o['boxes']).all() for o in found)

def test_a_shrunk_batch(batch):
    "Images, sizes and boxes shrink alike, and the padding stays empty"
    images,sizes,target = batch
    small,fed,truth = shrunk(images, sizes, target, .5)
    assert small.shape == (2, 3, 64, 64) and small.dtype == images.dtype
    assert fed.tolist() == truth.size.tolist() == [[48, 64], [64, 56]]
    torch.testing.assert_close(truth.boxes, target.boxes/2)
    assert not small[0, :, 48:].any() and not small[1, :, :, 56:].any()
    torch.testing.assert_close(small[1, :, :, :56].float().mean(), images[1, :, :, :112].float().mean(), atol=1., rtol=0.)


def test_first_boxes_are_those_of_the_grid_and_of_the_head(batch):
    images,sizes,_ = batch
    net = detector('first_boxes').net.eval()
    state,feats = net.start(images, sizes)
    grid = net.queries.grid(sizes)
    torch.testing.assert_close(state.boxes[:, :100], grid.boxes)
    assert state.boxes.shape==(2,150,4)
    w,h = sizes.flip(-1)[:, None].unbind(-1)
    more = state.boxes[:, 100:]
    assert (more[..., 0::2] <= w[..., None] + 2.01).all() and (more[..., 1::2] <= h[..., None] + 2.01).all()
    near = torch.cdist((more[..., :2] + more[..., 2:])/2, (grid.boxes[..., :2] + grid.boxes[..., 2:])/2).argmin(-1)
    want = torch.stack([q[i] for q,i in zip(grid.content, near)])
    torch.testing.assert_close(state.content[:, 100:], want)

def test_first_boxes_of_another_family(batch):
    "Sparse R-CNN's queries, and as many at boxes of the dense head; its loss reaches head and neck"
    torch.manual_seed(0)
    hyper = families.families(32, 4, (2, 2, .4))['sparse_rcnn']
    net = replace(hyper, n_classes=2, strategy=Settled(2, (2,), perturb=None, recompute=False)).build(vocab=['a','b'])
    families.add_first_boxes(net)
    images,sizes,target = batch
    state,feats = net.train().start(images, sizes)
    assert state.boxes.shape==(2, 8, 4)
    dense_loss(net.dense, feats, images, target).backward()
    assert all(p.grad is not None for p in net.dense.head.parameters())
    assert any(p.grad is not None for p in net.pyramid.parameters())
    found = net.predict(images, sizes)
    assert all(torch.isfinite(o['boxes']).all() for o in found)


class Toy(nn.Module):
    "A step that detaches its boxes, as AdaMixer's"
    def __init__(self):
        super().__init__()
        self.content,self.reg = nn.Linear(8, 8),nn.Linear(8, 4)
    def forward(self, z):
        q = (self.content(z.content) + z.xyzr.detach().sum(-1, keepdim=True)).tanh()
        return State(q, z.xyzr.detach() + self.reg(q))

def test_two_looks_change_gradients_only():
    torch.manual_seed(0)
    f = Toy().double()
    z = State(torch.randn(2,5,8).double(), torch.randn(2,5,4).double())
    once,twice,first = RAG(2)(f, z),LookTwice()(f, z),f(z)
    assert all(torch.equal(a, b) for a,b in zip(parts(once), parts(twice)))
    a,b,more = (torch.autograd.grad(o.xyzr.sum(), f.reg.weight)[0] for o in (once, twice, first))
    torch.testing.assert_close(b, a + more)

def test_the_second_group_lies_between_the_first(batch):
    images,sizes,_ = batch
    own = detector('groups')
    state,_ = own.net.start(images, sizes)
    second = own.between(state, sizes)
    moved = (second.boxes - state.boxes)[:, 0]
    torch.testing.assert_close(moved, torch.tensor([[6.4,4.8,6.4,4.8],[5.6,6.4,5.6,6.4]]))
    assert torch.equal(second.content, state.content)

def test_without_an_initial_step(batch):
    "The weights of g are gone, and the first guess is the step's"
    own = detector('no_init')
    decoder = own.net.decoder
    fewer = sum(p.numel() for p in own.net.parameters())
    assert fewer < sum(p.numel() for p in detector('deqdet_lite').net.parameters())
    state,feats = own.net.eval().start(*batch[:2])
    table = decoder.step.prepare(feats)
    guess = decoder.trajectory(state, feats, steps=1)[0][0]
    torch.testing.assert_close(guess.content, decoder.step(state, table).content)


def test_relations(batch):
    "Zero at first; unchanged where all boxes move or grow alike"
    first,second = detector('deqdet_lite'), detector('related')
    for a,b in zip(first.detect(*batch), second.detect(*batch)): torch.testing.assert_close(a['boxes'], b['boxes'])
    boxes = batch[2].boxes[:1]
    torch.testing.assert_close(relative(boxes + 7), relative(boxes))
    torch.testing.assert_close(relative(3*boxes), relative(boxes))
    assert Relation(8)(boxes).shape==(1, 8, 2, 2)


def test_low_rank():
    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    x = torch.randn(5, 12)
    torch.testing.assert_close(LowRank(layer, 12)(x), layer(x), rtol=1e-4, atol=1e-5)
    gaps = [(LowRank(layer, r)(x) - layer(x)).norm() for r in (2, 6, 10)]
    assert gaps[0] > gaps[1] > gaps[2] > 1e-3

def test_light_has_fewer_weights():
    sizes = {k: sum(p.numel() for s in steps_of(detector(k).net.decoder) for p in s.mixing.parameters()) for k in ('deqdet_lite', 'light')}
    assert sizes['light'] < .45*sizes['deqdet_lite']

def test_thinned():
    "Images with a rare class are few; the others stay, and with them all their objects"
    from thin import few, thinned
    cats = [dict(id=i, name=n) for i,n in enumerate('abc', 1)]
    images = [dict(id=i) for i in range(40)]
    objects = [dict(image_id=i, category_id=1) for i in range(40)] + [dict(image_id=i, category_id=2 + i%2) for i in range(20)]
    found = thinned(dict(images=images, annotations=objects, categories=cats), ['b','c'], 3)
    of = {k: {o['image_id'] for o in found['annotations'] if o['category_id']==k} for k in (1, 2, 3)}
    assert len(of[2])==len(of[3])==3 and len(of[1])==26 and of[1]=={o['id'] for o in found['images']}
    assert len(found['annotations'])==32
    assert [len(few(found, 5)[k]) for k in ('images','categories')]==[5, 3] and few(found, 5)==few(found, 5)

def test_a_cell_of_before_stands(tmp_path):
    "Entries from before an option was there count as without it"
    args = SimpleNamespace(set='bccd', kind='fcos', minutes=3., updates=0, seed=0, opt='muon', lr=2.5e-3, class_lr=0., frozen=3, rare=0., size=320, augment='')
    want = own_data.cell(args)
    own_data.write(tmp_path/'a.json', {k: v for k,v in want.items() if k not in ('rare', 'augment')})
    assert own_data.stands(tmp_path/'a.json', want) and not own_data.stands(tmp_path/'a.json', want | dict(rare=.3))
    assert not own_data.stands(tmp_path/'a.json', want | dict(size=544)) and not own_data.stands(tmp_path/'a.json', want | dict(augment='crop'))

def test_fewer_points_are_the_same_points(batch):
    "Those that stay lie where they lay; all points in another order give the same step"
    images,sizes,_ = batch
    net = detector('deqdet_lite').net.eval()
    z,feats = net.start(images, sizes)
    step = net.decoder.step
    before,points = step(z, feats), step.sampler.points(z.content, z.xyzr)
    keep_points(step, list(reversed(range(16))))
    torch.testing.assert_close(step(z, feats).content, before.content, atol=1e-4, rtol=1e-4)
    keep_points(step, [3, 5])
    torch.testing.assert_close(step.sampler.points(z.content, z.xyzr), points[..., [12, 10], :])
    assert step.mixing.sizes[2]==2 and torch.isfinite(step(z, feats).content).all()
