"The page 00_deqdet computes what the chapters compute: same weights, same noise, equal answers"
import ast, json, re
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from torch import nn
from torch.testing import assert_close
from deqdet.backbone import Neck
from deqdet.boxes import iof, move, pairs, xyxy_to_xyzr, xyzr_to_xyxy
from deqdet.decoder import (Pred, Queries, SelfAttention, State, box_tower, class_tower, grid_boxes,
                            position_embedding)
from deqdet.equilibrium import Equilibrium, Perturb, Settled
from deqdet.loss import SetLoss
from deqdet.mixer import MixerStep
from deqdet.mixing import AdaptiveMixing, Sampler
from deqdet.sets.images import Target

NBS = Path(__file__).resolve().parents[1]/'nbs'
PAGE = NBS/'00_deqdet.ipynb'
CELLS = json.loads(PAGE.read_text(encoding='utf-8'))['cells']
CODE = [''.join(c['source']) for c in CELLS if c['cell_type']=='code']
TEXT = '\n'.join(''.join(c['source']) for c in CELLS if c['cell_type']=='markdown')

def is_definition(node):
    "An import, a function, a class, or a constant: upper-case names and a literal"
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)): return True
    if not isinstance(node, ast.Assign): return False
    names = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
    return all(n.isupper() for n in names) and not any(isinstance(n, ast.Call) for n in ast.walk(node.value))

@pytest.fixture(scope='module')
def page():
    "What the page defines, without what it runs"
    scope = {}
    for src in CODE:
        if all(map(is_definition, ast.parse(src).body)): exec(src, scope)
    return SimpleNamespace(**{k: v for k,v in scope.items() if not k.startswith('__')})

def shake(module, std=.1):
    "Weights under which nothing is zero or at rest"
    torch.manual_seed(1)
    for p in module.parameters():
        with torch.no_grad(): p.add_(torch.randn_like(p)*std)
    return module

def same_weights(ours, theirs):
    "The chapter's module with the page's weights, whose names are equal"
    theirs.load_state_dict(ours.state_dict())
    return theirs

def chapter_step(page):
    return MixerStep(page.K, page.D, page.G*page.C, page.G, page.P, page.O, page.HEADS, page.HIDDEN, page.STRIDES)

def small_world(page, B=2):
    "Contents, upright corners and features of B images"
    torch.manual_seed(0)
    q = torch.randn(B, page.N, page.D)
    xy = torch.rand(B, page.N, 2)*page.SIDE
    half = 4 + 20*torch.rand(B, page.N, 2)
    feats = [torch.randn(B, page.G*page.C, page.SIDE//s, page.SIDE//s) for s in page.STRIDES]
    return q, torch.cat([xy-half, xy+half], -1), feats

def truth_of(page, counts=(3, 1, 0)):
    "Lists of boxes and labels as the page has them, and the chapter's padded target"
    torch.manual_seed(2)
    truth,labels = [],[]
    for n in counts:
        xy = 10 + 50*torch.rand(n, 2)
        truth.append(torch.cat([xy, xy + 5 + 30*torch.rand(n, 2)], -1))
        labels.append(torch.randint(page.K, (n,)))
    most,B = max(counts),len(counts)
    target = Target(torch.zeros(B, most, 4), torch.full((B, most), -1), torch.full((B, 2), page.SIDE), torch.arange(B))
    for i,n in enumerate(counts):
        target.boxes[i, :n] = truth[i]
        target.labels[i, :n] = labels[i]
    return truth, labels, target

# ---- boxes

def test_boxes(page):
    torch.manual_seed(0)
    corners = torch.randn(50, 4)*30                     # inverted ones among them
    xyzr,d = xyxy_to_xyzr(corners),torch.randn(50, 4)
    assert torch.equal(page.to_xyzr(corners), xyzr)
    assert torch.equal(page.to_corners(xyzr), xyzr_to_xyxy(xyzr))
    assert torch.equal(page.move(xyzr, d), move(xyzr, d))
    assert torch.equal(page.iof(corners[None]), iof(*pairs(corners, corners))[None])

# ---- the step and its parts

def test_sampling(page):
    q,corners,feats = small_world(page)
    ours = shake(page.Sampler())
    theirs = same_weights(ours, Sampler(page.D, page.G, page.P, page.STRIDES))
    xyzr = page.to_xyzr(corners)
    assert_close(ours(q, xyzr, feats), theirs(q, xyzr, feats), atol=1e-4, rtol=1e-4)

def test_mixing(page):
    ours = shake(page.Mixing())
    theirs = same_weights(ours, AdaptiveMixing(page.D, page.C, page.G, page.P, page.O))
    q,x = torch.randn(2, page.N, page.D),torch.randn(2, page.N, page.G, page.P, page.C)
    assert_close(ours(q, x), theirs(q, x), atol=1e-4, rtol=1e-4)

def test_attention_and_positions(page):
    q,corners,_ = small_world(page)
    xyzr = page.to_xyzr(corners)
    assert_close(page.embed(xyzr), position_embedding(xyzr, page.D), atol=1e-6, rtol=0)
    ours = shake(page.Attention())
    bias = torch.randn(2, page.HEADS, page.N, page.N)
    assert_close(ours(q, bias), same_weights(ours, SelfAttention(page.D, page.HEADS))(q, bias), atol=1e-5, rtol=0)

@pytest.mark.parametrize('noise', [0., 60.])
def test_step(page, noise):
    "Also from noisy corners, some of them inside out"
    q,corners,feats = small_world(page)
    noisy = corners + noise*torch.randn_like(corners)
    assert noise==0 or (noisy[..., 2] < noisy[..., 0]).any()
    ours = shake(page.Step(), .03)
    theirs = same_weights(ours, chapter_step(page))
    state = State.at(q, corners).jitter(noisy - corners)
    mine,want = ours((q, noisy), feats),theirs(state, feats)
    assert (mine[1] - noisy).abs().max() > 1 # the boxes do move
    assert_close(mine[0], want.content, atol=1e-3, rtol=1e-3)
    assert_close(mine[1], want.boxes, atol=1e-2, rtol=1e-3)
    assert_close(ours.read(mine)[0], theirs.read(want).logits, atol=1e-3, rtol=1e-3)

def spread(p): return float(p.detach().float().std())

def test_weights_begin_as_in_the_chapters(page):
    "Constant where those are constant, else equally spread"
    torch.manual_seed(0)
    ours,theirs = page.Step().state_dict(),chapter_step(page).state_dict()
    assert ours.keys()==theirs.keys()
    for k,v in theirs.items():
        if spread(v)==0 or v.numel() < 300 or 'offsets' in k: assert v.shape==ours[k].shape and (spread(v)==0) == (spread(ours[k])==0), k
        else: assert .85 < spread(ours[k])/spread(v) < 1.18, k
        if spread(v)==0 or 'offsets' in k: assert_close(ours[k], v)

def test_neck(page):
    x = torch.rand(2, 3, page.SIDE, page.SIDE)
    ours = page.Pyramid().eval()
    neck = Neck((32, 64, 64), page.G*page.C, groups=4)
    neck.load_state_dict({k.replace('neck.', 'convs.'): v for k,v in ours.state_dict().items() if not k.startswith('body')})
    maps,y = [],2*x - 1
    for body in ours.body:
        y = body(y)
        maps.append(y)
    assert [m.shape[-1]*s for m,s in zip(maps, page.STRIDES)]==[page.SIDE]*len(page.STRIDES)
    for a,b in zip(ours(x), neck(maps)): assert_close(a, b, atol=1e-5, rtol=1e-5)

# ---- the equilibrium

@pytest.fixture
def both(page):
    "The page's detector and the chapter's decoder, with equal weights; images, first state, features"
    torch.manual_seed(0)
    model = page.DEQDet().eval() # BatchNorm would else change from call to call
    for step in (model.g, model.f): shake(step, .02)
    model.double()                            # nine steps enlarge what float32 rounds, on each processor another way
    g,f = (same_weights(step, chapter_step(page).double()) for step in (model.g, model.f))
    plan = Settled(steps=page.T, supervise=page.SUPERVISED, perturb=Perturb(position=3.))
    images = torch.rand(2, 3, page.SIDE, page.SIDE).double()
    start,feats = model.start(images)
    return SimpleNamespace(model=model, decoder=Equilibrium(g, f, plan=plan), images=images,
                           state=State.at(*start), feats=feats)

def test_queries(page, both):
    side = round(page.N**.5)
    theirs = Queries(page.N, page.D, boxes=grid_boxes(side, side, side=.4))
    theirs.content.weight.data = both.model.content.data
    (q,boxes),_ = both.model.start(both.images)
    want = theirs.double()(torch.full((2, 2), page.SIDE))
    assert_close(q, want.content)
    assert_close(boxes, want.boxes, atol=1e-4, rtol=0)

@pytest.mark.parametrize('seed', [0, 1])
def test_nine_predictions_and_their_gradients(page, both, seed):
    "RAG and RAP: the same coins, the same noise, the same nine predictions, the same gradients"
    torch.manual_seed(seed)
    ours = page.supervised(both.model, both.images)
    torch.manual_seed(seed)
    theirs = both.decoder.supervised(both.state, [f.detach() for f in both.feats])
    assert len(ours)==len(theirs)==9
    for (logits,boxes),want in zip(ours, theirs):
        assert_close(logits, want.logits, atol=1e-5, rtol=1e-5)
        assert_close(boxes, want.boxes, atol=1e-4, rtol=1e-5)
    torch.manual_seed(3)
    weights = [(torch.randn_like(l), torch.randn_like(b)/page.SIDE) for l,b in ours]
    sum((l*u).sum() + (b*v).sum() for (l,b),(u,v) in zip(ours, weights)).backward()
    sum((p.logits*u).sum() + (p.boxes*v).sum() for p,(u,v) in zip(theirs, weights)).backward()
    for mine,want in ((both.model.g, both.decoder.init), (both.model.f, both.decoder.step)):
        named = dict(want.named_parameters())
        for k,p in mine.named_parameters():
            assert (p.grad - named[k].grad).norm() <= 1e-4*named[k].grad.norm() + 1e-6, k

def test_noise_is_that_of_the_chapter(page):
    q,corners,_ = small_world(page)
    kinds = set()
    for seed in range(12):
        torch.manual_seed(seed)
        mine = page.perturb((q, corners))
        torch.manual_seed(seed)
        want = Perturb(position=3.)(State.at(q, corners))
        assert_close(mine[0], want.content)
        assert_close(mine[1], want.boxes, atol=1e-4, rtol=0)
        kinds.add((torch.equal(mine[0], q), torch.equal(mine[1], corners)))
    assert len(kinds) >= 3 # neither, one, the other

def test_inference(page, both):
    with torch.no_grad(): path = both.decoder.eval().trajectory(both.state, both.feats)
    states = page.run(both.model, both.images)
    assert len(states)==len(path)==page.T + 2
    for (q,boxes),(want,_) in zip(states, path):
        assert_close(q, want.content, atol=5e-3, rtol=5e-3)
        assert_close(boxes, want.boxes, atol=1e-4, rtol=1e-5)

# ---- matching and loss

def prediction(page, B=3):
    torch.manual_seed(4)
    xy = 10 + 60*torch.rand(B, page.N, 2)
    boxes = torch.cat([xy, xy + 5 + 30*torch.rand(B, page.N, 2)], -1)
    return torch.randn(B, page.N, page.K).requires_grad_(), boxes.requires_grad_()

def test_matching(page):
    logits,boxes = prediction(page)
    truth,labels,target = truth_of(page)
    where = SetLoss().match(logits[None], boxes[None], target)
    for n in range(3):
        i,j = page.match(logits[n], boxes[n], truth[n], labels[n])
        there = where[1]==n
        assert torch.equal(i, where[2, there]) and torch.equal(j, where[3, there])

@pytest.mark.parametrize('counts', [(3, 1, 0), (0, 0, 0), (4, 4, 4)])
def test_loss_and_gradients(page, counts):
    "An image without objects and a batch without any are normal"
    logits,boxes = prediction(page)
    truth,labels,target = truth_of(page, counts)
    ours = page.set_loss(logits, boxes, truth, labels)
    mine = torch.autograd.grad(ours, (logits, boxes), allow_unused=True)
    theirs = SetLoss()([Pred(logits, boxes)], target)
    want = torch.autograd.grad(theirs, (logits, boxes), allow_unused=True)
    assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for a,b in zip(mine, want):
        zero = torch.zeros(())
        assert_close(zero if a is None else a, zero.expand_as(a) if b is None and a is not None else zero if b is None else b,
                     atol=1e-5, rtol=1e-3)

# ---- the page itself

def test_imports_only_images_and_the_drawer():
    "Nothing of the package but generated images and boxes drawn on them"
    found = [n.module for src in CODE for n in ast.walk(ast.parse(src)) if isinstance(n, ast.ImportFrom)]
    names = [a.name for src in CODE for n in ast.walk(ast.parse(src)) if isinstance(n, ast.Import) for a in n.names]
    assert {m for m in found if m.startswith('deqdet')}=={'deqdet.ops.draw', 'deqdet.sets.scenes'}
    assert not [n for n in names if n.startswith('deqdet')]

def test_fits_on_a_page():
    "250 lines below the imports; directives and sizes (`D = 64`) are not counted"
    below = [src for src in CODE if not re.match('import|from', src)]
    lines = [l for src in below for l in src.splitlines() if l.strip() and not re.match(r'#\||[A-Z]+ = ', l)]
    assert len(lines) <= 250

def test_each_block_names_its_chapter():
    for chapter in ('01_boxes', '03_backbone', '04_mixing', '05_decoder', '06_mixer', '07_solver', '08_equilibrium', '09_loss'):
        assert re.search(rf'\[{chapter}\]\({chapter}\.ipynb\)', TEXT), chapter

def test_diagram_is_drawn():
    "An image in the text, with words for those who cannot see it"
    alt,file = re.search(r'!\[(.*?)\]\((.*?)\)', TEXT).groups()
    svg = (NBS/file).read_text(encoding='utf-8')
    assert len(alt.split()) > 30 and svg.startswith('<svg') and '<title>' in svg and '<desc>' in svg
