"The set loss on many random batches, in fastai's loop, in other precisions, and where nothing should be finite"
import pickle, subprocess, sys
from types import SimpleNamespace
import numpy as np, pytest, torch
from scipy.optimize import linear_sum_assignment
from deqdet.boxes import giou, pairs
from deqdet.decoder import Pred
from deqdet.loss import SetLoss, assign, decode, focal_cost
from torchvision.ops import sigmoid_focal_loss


def draw(seed, S=3, B=3, N=12, K=4, M=5, dtype=torch.float32):
    "Random states and truth; images hold between none and M objects, padding anywhere"
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=dtype)
    size = torch.randint(60, 200, (B,2), generator=g)
    def boxes(*s):
        xy,wh = rand(*s, 2)*100, rand(*s, 2)*60 + .5
        return torch.cat([xy, xy + wh], -1)
    labels = torch.randint(0, K, (B,M), generator=g).where(torch.rand(B, M, generator=g) < .6, -1)
    truth = boxes(B, M)*labels.ge(0)[..., None]
    target = SimpleNamespace(boxes=truth, labels=labels, size=size, image_id=torch.arange(B) + 100)
    return [Pred(rand(B, N, K)*8 - 6, boxes(B, N)) for _ in range(S)], target


def plain(preds, target):
    "The definition: one state, one image, one object at a time"
    total,n = 0., 0
    for s,p in enumerate(preds):
        for b,(logits,boxes) in enumerate(zip(*p)):
            real = target.labels[b] >= 0
            labels,truth = target.labels[b][real], target.boxes[b][real]
            whwh = target.size[b].flip(0).repeat(2)
            l1 = (boxes[:, None]/whwh - truth/whwh).abs().sum(-1)
            g = giou(*pairs(boxes, truth))
            q,t = linear_sum_assignment((2*focal_cost(logits, labels) + 5*l1 - 2*g).numpy())
            hot = torch.zeros_like(logits)
            hot[q,labels[t]] = 1
            total += 2*sigmoid_focal_loss(logits, hot, reduction='sum') + (5*l1 + 2*(1 - g))[q,t].sum()
            n += len(q)*(s==0)
    return total/max(n, 1)


@pytest.mark.parametrize('seed', range(20))
def test_equals_the_definition(seed):
    preds,target = draw(seed)
    torch.testing.assert_close(SetLoss()(preds, target), plain(preds, target), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('seed', range(10))
def test_orders_mean_nothing(seed):
    preds,target = draw(seed)
    q,m,b = torch.randperm(12), torch.randperm(5), torch.randperm(3)
    moved = [Pred(p.logits[:,q][b], p.boxes[:,q][b]) for p in preds]
    other = SimpleNamespace(boxes=target.boxes[:,m][b], labels=target.labels[:,m][b], size=target.size[b],
                            image_id=target.image_id[b])
    loss = SetLoss(reduction='none')
    torch.testing.assert_close(loss(moved, other), loss(preds, target)[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('seed', range(5))
def test_more_padding_changes_nothing(seed):
    preds,target = draw(seed)
    wide = SimpleNamespace(**vars(target) | dict(boxes=torch.nn.functional.pad(target.boxes, (0,0,0,3)),
                                                 labels=torch.nn.functional.pad(target.labels, (0,3), value=-1)))
    assert SetLoss()(preds, wide) == SetLoss()(preds, target)


@pytest.mark.parametrize('seed', range(5))
def test_states_add_up(seed):
    preds,target = draw(seed)
    loss = SetLoss()
    each = [loss([p], target) for p in preds]
    torch.testing.assert_close(loss(preds, target), sum(each))
    for s,l in enumerate(each): torch.testing.assert_close(sum(loss.terms[f'{s}/{k}'] for k in ('cls','l1','giou')), l)
    torch.testing.assert_close(sum(loss.terms[k] for k in ('cls','l1','giou')), sum(each))
    assert not any(v.requires_grad for v in loss.terms.values())


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('shape', [(1,1,1,1,1), (2,2,1,3,6), (1,3,7,2,1), (2,1,30,20,9)])
def test_finite_whatever_the_boxes(seed, shape):
    "Inverted, empty, huge and tiny predicted boxes, flat objects, any number of objects"
    S,B,N,K,M = shape
    preds,target = draw(seed, S, B, N, K, M)
    g = torch.Generator().manual_seed(seed)
    kinds = [[0,1,2,3], [2,1,0,3], [2,3,0,1], [0,1,0,1]]
    logits = torch.stack([p.logits for p in preds])*torch.randint(0, 300, (1,), generator=g)
    boxes = torch.stack([p.boxes for p in preds])
    boxes = torch.stack([boxes[..., kinds[i]] for i in torch.randint(0, 4, (4,), generator=g)]).mean(0)
    boxes = (boxes*10**torch.randint(-6, 4, (1,), generator=g)).requires_grad_()
    logits.requires_grad_()
    if seed % 2: target.boxes[..., 2] = target.boxes[..., 0]
    l = SetLoss()([Pred(*o) for o in zip(logits, boxes)], target)
    l.backward()
    assert l.isfinite() and l >= 0
    assert logits.grad.isfinite().all() and boxes.grad.isfinite().all()


def test_no_object_anywhere_still_reaches_the_boxes():
    preds,target = draw(0)
    leaves = [o.clone().requires_grad_() for o in preds[0]]
    target.labels = target.labels*0 - 1
    SetLoss()([Pred(*leaves)], target).backward()
    assert (leaves[1].grad == 0).all() and (leaves[0].grad != 0).any()


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('form', ['xyxy','cxcywh'])
def test_gradcheck(seed, form):
    preds,target = draw(seed, S=2, B=2, N=4, K=3, M=3, dtype=torch.float64)
    leaves = [torch.stack(o).requires_grad_() for o in zip(*preds)]
    loss = SetLoss(form=form)
    assert torch.autograd.gradcheck(lambda l, b: loss([Pred(*o) for o in zip(l, b)], target), leaves)
    assert loss(preds, target).dtype == torch.float64


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype):
    preds,target = draw(1)
    half = [Pred(p.logits.to(dtype), p.boxes) for p in preds]
    wide = [Pred(p.logits.float(), p.boxes) for p in half]
    with torch.autocast('cpu', torch.bfloat16): inside = SetLoss()(half, target)
    assert inside.dtype == torch.float32 and inside == SetLoss()(wide, target)


def test_deformable_detrs_l1():
    "`form='cxcywh'` compares normalised centres and sides"
    preds,target = draw(2)
    loss = SetLoss(form='cxcywh', w_cls=0., w_giou=0., w_l1=1.)
    value = loss(preds[:1], target)
    s,b,q,t = loss.match(preds[0].logits[None], preds[0].boxes[None], target)
    def norm(x):
        x1,y1,x2,y2 = x.T
        h,w = target.size[b].T
        return torch.stack([(x1+x2)/2/w, (y1+y2)/2/h, (x2-x1)/w, (y2-y1)/h])
    want = (norm(preds[0].boxes[b,q]) - norm(target.boxes[b,t])).abs().sum()/len(b)
    torch.testing.assert_close(value, want)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('field', [0, 1])
@pytest.mark.parametrize('seed', range(4))
def test_non_finite_names_the_image(seed, field, value):
    preds,target = draw(seed)
    b,q,j = seed % 3, seed, seed % 4
    preds[1][field][b,q,j] = value
    where = rf"'(cls|l1)' is not finite: supervised states \[1\], image ids \[{100+b}\]"
    with pytest.raises(FloatingPointError, match=where):
        SetLoss()(preds, target)


def test_bad_arguments():
    preds,target = draw(0)
    with pytest.raises(TypeError): SetLoss(cost_iou=1.)
    with pytest.raises(ValueError, match='reduction'): SetLoss(reduction='sum')(preds, target)
    target.labels[0,0] = 4
    with pytest.raises(ValueError, match='label 4 in images .* 4 classes'): SetLoss()(preds, target)


def test_pickle_keeps_everything():
    preds,target = draw(0)
    loss = pickle.loads(pickle.dumps(SetLoss(w_l1=3., matcher=assign, reduction='none')))
    assert repr(loss) == repr(SetLoss(w_l1=3., reduction='none'))
    assert (loss(preds, target) == SetLoss(w_l1=3., reduction='none')(preds, target)).all()


@pytest.mark.parametrize('max_dets', [1, 7, 48, 100])
def test_decode(max_dets):
    pred = draw(3)[0][0]
    det = decode(pred, max_dets)
    k = min(max_dets, 48)
    assert [o.shape for o in det] == [(3,k), (3,k), (3,k,4)]
    for b in range(3):
        every = pred.logits[b].sigmoid().numpy()
        order = np.argsort(-every, axis=None)[:k]
        want = {(int(i) % 4, *pred.boxes[b,int(i)//4].tolist()) for i in order}
        assert {(l, *x) for l,x in zip(det.labels[b].tolist(), det.boxes[b].tolist())} == want
        np.testing.assert_allclose(det.scores[b].numpy(), every.ravel()[order], rtol=1e-6)


def test_imports_without_fastai():
    code = "import sys, deqdet.loss; sys.exit(any(m.split('.')[0]=='fastai' for m in sys.modules))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


class Free(torch.nn.Module):
    "A model without sight: two states of learned boxes and logits, the second a little better"
    def __init__(self, n=6, k=3):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(n, k) - 2)
        self.boxes = torch.nn.Parameter(torch.rand(n, 4)*30 + torch.tensor([0,0,30,30]))

    def forward(self, images, sizes):
        logits,boxes = (o.expand(len(images), -1, -1) for o in (self.logits, self.boxes))
        return [Pred(logits*s, boxes) for s in (.5,1)]


def learner(n=5, bs=2):
    "A fastai learner on n images, one of them without objects"
    from deqdet.data import DetDL, Target
    from fastai.data.core import DataLoaders
    from fastai.learner import CastToTensor, Learner
    import fastai.callback.progress # brings `no_bar`
    torch.manual_seed(0)
    size = torch.tensor([64,64])
    boxes = torch.rand(n, 2, 4)*20 + torch.tensor([0,0,40,40])
    labels = torch.randint(0, 3, (n,2))
    items = [(torch.zeros(3, 64, 64, dtype=torch.uint8), Target(boxes[i], labels[i], size, torch.tensor(i)))
             for i in range(n)]
    items[1] = items[1][0], Target(boxes[1,:0], labels[1,:0], size, torch.tensor(1))
    dls = DataLoaders(*[DetDL(items, bs=bs, shuffle=False, num_workers=0) for _ in range(2)])
    learn = Learner(dls, Free(), loss_func=SetLoss(), lr=.1)
    learn.remove_cbs(CastToTensor) # it would turn a Target into a plain tuple
    return learn


def test_in_fastais_loop():
    learn = learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    first,last = learn.recorder.losses[0], learn.recorder.losses[-1]
    assert last < first and learn.loss_func.reduction == 'mean'


def test_get_preds_with_everything():
    learn = learner()
    with learn.no_bar(): preds,targs,dec,losses = learn.get_preds(with_decoded=True, with_loss=True)
    assert type(preds).__name__ == 'Scored' and preds.scores.shape == (5,6,3) and 0 <= preds.scores.min()
    assert type(dec).__name__ == 'Detections' and dec.boxes.shape == (5,18,4)
    assert losses.shape == (5,) and targs.labels.shape == (5,2)
    *xb,y = learn.dls.valid.one_batch()
    torch.testing.assert_close(losses[:2].sum(), learn.loss_func(learn.model(*xb), y).detach())


def test_top_losses():
    from fastai.interpret import Interpretation
    learn = learner()
    with learn.no_bar(): losses,idx = Interpretation.from_learner(learn).top_losses()
    assert sorted(idx.tolist()) == [0,1,2,3,4] and (losses.diff() <= 0).all()
    assert idx[-1] == 1 # the image without objects has only focal terms to pay


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    "The same values and gradients as on the processor"
    preds,target = draw(0)
    res = []
    for dev in ('cpu','cuda'):
        leaves = [torch.stack(o).to(dev).requires_grad_() for o in zip(*preds)]
        tgt = SimpleNamespace(**{k: v.to(dev) for k,v in vars(target).items()})
        l = SetLoss()([Pred(*o) for o in zip(*leaves)], tgt)
        l.backward()
        res.append([l.detach().cpu(), *(o.grad.cpu() for o in leaves)])
    for a,b in zip(*res): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
