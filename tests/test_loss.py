"The set loss on many random batches, in fastai's loop, in other precisions, and where nothing should be finite"
import itertools, pickle
from dataclasses import fields, replace
from types import SimpleNamespace
import numpy as np, pytest, torch
from scipy.optimize import linear_sum_assignment
from deqdet.boxes import giou, pairs
from deqdet.decoder import Pred
from deqdet.loss import SetLoss, assign, check_finite, decode, focal_cost, upright
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


@pytest.mark.parametrize('queries, found', [(12, 24), (80, 100), (130, 130)])
def test_decode_gives_a_box_for_each_query(queries, found):
    pred = Pred(torch.randn(2, queries, 2), torch.rand(2, queries, 4))
    assert decode(pred, None).scores.shape == (2, found)


def test_imports_without_fastai(loaded): assert 'fastai' not in loaded['loss']


# ----------------------------------------------------------------------------- on the two images of the loss's page

LOSS = SetLoss()
TRUTH = torch.tensor([[14., 20, 66, 70], [47, 49, 81, 83], [92, 14, 120, 46]])


def two_images(n=7, seed=0):
    "Two states of `n` queries, stacked, on two images, one with three objects and one with one"
    torch.manual_seed(seed)
    second = torch.nn.functional.pad(torch.tensor([[10., 12, 50, 44]]), (0, 0, 0, 2))
    target = SimpleNamespace(boxes=torch.stack([TRUTH, second]), labels=torch.tensor([[0, 1, 2], [1, -1, -1]]),
                             size=torch.tensor([[96, 128], [64, 80]]), image_id=torch.tensor([7, 8]))
    boxes = torch.rand(2, 2, n, 4)*30 + torch.tensor([8, 8, 44, 40])
    return torch.randn(2, 2, n, 3) - 2, boxes, target


def preds_of(logits, boxes): return [Pred(*o) for o in zip(logits, boxes)]
def altered(target, **kw): return SimpleNamespace(**(vars(target) | kw))
def empty(target): return altered(target, boxes=target.boxes*0, labels=target.labels*0 - 1)


def cheapest(cost):
    "The cheapest one-to-one assignment, by trying every one of them"
    n, m = cost.shape
    if n < m: return {(q, t) for t, q in cheapest(cost.T)}
    every = (list(zip(q, range(m))) for q in itertools.permutations(range(n), m))
    return set(min(every, key=lambda o: sum(cost[q, t] for q, t in o)))


def test_class_costs_are_what_a_pair_adds_to_the_focal_loss():
    torch.manual_seed(0)
    logits = torch.randn(7, 3)
    labels = torch.tensor([0, 2, 1])
    pick = {3: 1, 0: 0, 4: 2} # query: object
    hot = torch.zeros(7, 3)
    for q, t in pick.items(): hot[q, labels[t]] = 1
    matched = sigmoid_focal_loss(logits, hot, reduction='sum')
    background = sigmoid_focal_loss(logits, hot*0, reduction='sum')
    cost = focal_cost(logits, labels)
    torch.testing.assert_close(matched - background, sum(cost[q, t] for q, t in pick.items()), atol=1e-6, rtol=0)


def test_assign_equals_trying_everything():
    "Several states and images at once, padded columns that would attract every query, an image without objects"
    torch.manual_seed(0)
    cost = torch.randn(3, 4, 4, 3)
    labels = torch.tensor([[0, 1, 2], [0, -1, 5], [-1, 3, -1], [-1, -1, -1]])
    cost[labels.lt(0)[None, :, None, :].expand_as(cost)] = -99
    where = assign(cost, labels).T.tolist()
    for s, b in itertools.product(range(3), range(4)):
        cols = labels[b].ge(0).nonzero()[:, 0]
        want = {(q, cols[t].item()) for q, t in cheapest(cost[s, b][:, cols])} if len(cols) else set()
        assert {(q, t) for si, bi, q, t in where if (si, bi) == (s, b)} == want


def test_more_objects_than_queries():
    "Every query gets an object, and the dearest objects go without"
    crowd = torch.randn(1, 1, 2, 5, generator=torch.Generator().manual_seed(0))
    _, _, q, t = assign(crowd, torch.zeros(1, 5)).tolist()
    assert len(q) == 2 and set(zip(q, t)) == cheapest(crowd[0, 0])


def test_upright_changes_no_proper_box_and_orders_the_others():
    assert torch.equal(upright(TRUTH), TRUTH)
    wrong, small = torch.tensor([100., 100, 0, 0]), torch.tensor([40., 40, 60, 60])
    assert torch.equal(upright(wrong), torch.tensor([0., 0, 100, 100]))
    assert giou(wrong, small) > 1 # what it is there for
    torch.testing.assert_close(giou(upright(wrong), small), torch.tensor(20*20/100**2))


def test_the_order_of_objects_alone_means_nothing():
    logits, boxes, target = two_images()
    order = torch.tensor([2, 0, 1])
    other = altered(target, boxes=target.boxes[:, order], labels=target.labels[:, order])
    preds = preds_of(logits, boxes)
    torch.testing.assert_close(LOSS(preds, other), LOSS(preds, target), rtol=1e-5, atol=1e-5)


TURNED = dict(cost_cls=200., cost_l1=0., cost_giou=100., w_cls=3., w_l1=3., w_giou=3., alpha=.5, gamma=1., form='cxcywh')


def test_every_field_is_turned(): assert set(TURNED) == {f.name for f in fields(SetLoss)} - {'matcher', 'reduction', 'scoring'}


@pytest.mark.parametrize('field', TURNED)
def test_every_weight_has_an_effect(field):
    logits, boxes, target = two_images()
    preds = preds_of(logits, boxes)
    other = replace(LOSS, **{field: TURNED[field]})
    assert abs(other(preds, target) - LOSS(preds, target)) > 1e-3


def test_shares_of_images():
    logits, boxes, target = two_images()
    preds = preds_of(logits, boxes)
    shares = replace(LOSS, reduction='none')(preds, target)
    assert shares.shape == (2,)
    torch.testing.assert_close(shares.sum(), LOSS(preds, target))
    with pytest.raises(ValueError, match="not 'median'"): replace(LOSS, reduction='median')(preds, target)
    with pytest.raises(TypeError, match='cost_iou'): SetLoss(cost_iou=2)


def test_an_image_has_the_same_share_alone():
    "Apart from the divisor: three objects in one image, one in the other"
    logits, boxes, target = two_images()
    def alone(i):
        one = SimpleNamespace(**{k: v[i:i+1] for k, v in vars(target).items()})
        return LOSS(preds_of(logits[:, i:i+1], boxes[:, i:i+1]), one)
    torch.testing.assert_close(LOSS(preds_of(logits, boxes), target), (3*alone(0) + alone(1))/4)


def test_matching_is_also_found_in_the_loss():
    "Names that older code imports from here"
    import deqdet.loss
    import deqdet.ops.matching as matching
    for name in ('assign', 'focal_cost', 'match_costs', 'upright'): assert getattr(deqdet.loss, name) is getattr(matching, name)


@pytest.mark.parametrize('form', ['xyxy', 'cxcywh'])
def test_relative_boxes_fill_their_image(form):
    from deqdet.ops.matching import relative_boxes
    size = torch.tensor([[96, 128], [64, 80]])
    whole = torch.cat([torch.zeros(2, 2), size.flip(-1)], -1)[:, None] # (2,1,4)
    want = dict(xyxy=[0., 0, 1, 1], cxcywh=[.5, .5, 1, 1])[form]
    found = relative_boxes(torch.stack([whole, whole]), size, form) # two states
    torch.testing.assert_close(found, torch.tensor(want).expand(2, 2, 1, 4))


def flat(target):
    boxes = target.boxes.clone()
    boxes[0, 0] = torch.tensor([30., 30, 30, 50])
    return altered(target, boxes=boxes)


EDGES = dict(no_object=lambda l, b, t: (l, b, empty(t)),
             no_column=lambda l, b, t: (l, b, altered(t, boxes=t.boxes[:, :0], labels=t.labels[:, :0])),
             one_query=lambda l, b, t: (l[:, :, :1], b[:, :, :1], t),
             one_way=lambda l, b, t: (l, b[..., [2, 1, 0, 3]], t),
             both_ways=lambda l, b, t: (l, b[..., [2, 3, 0, 1]], t),
             points=lambda l, b, t: (l, b[..., [0, 1, 0, 1]], t),
             on_the_spot=lambda l, b, t: (l[:, :, :3], t.boxes.expand(2, -1, -1, -1), t),
             flat_object=lambda l, b, t: (l, b, flat(t)),
             point_on_flat=lambda l, b, t: (l, flat(t).boxes[:, :1].expand(2, 2, 7, 4), flat(t)),
             sure=lambda l, b, t: (l.sign()*1000, b, t))


def grads(logits, boxes, target):
    leaves = [o.clone().requires_grad_() for o in (logits, boxes)]
    value = LOSS(preds_of(*leaves), target)
    value.backward()
    return value.detach(), *(o.grad for o in leaves)


@pytest.mark.parametrize('case', EDGES)
def test_finite_at_the_edges(case):
    value, g_logits, g_boxes = grads(*EDGES[case](*two_images()))
    assert value >= 0
    for o in (value, g_logits, g_boxes): assert o.isfinite().all()


def test_without_objects_only_the_focal_term_speaks():
    logits, boxes, target = two_images()
    value, _, g_boxes = grads(logits, boxes, empty(target))
    assert torch.equal(g_boxes, torch.zeros_like(boxes))
    assert value == grads(*EDGES['no_column'](logits, boxes, target))[0]


def test_the_divisor_counts_pairs():
    logits, boxes, target = two_images()
    assert LOSS.match(logits[:, :, :1], boxes[:, :, :1], target).shape[1] == 2*2 # one query for three objects
    s, b, q, t = LOSS.match(logits, boxes, target)
    assert [((s == i) & (b == j)).sum().item() for i in (0, 1) for j in (0, 1)] == [3, 1, 3, 1]


def test_bfloat16_logits_outside_autocast():
    logits, boxes, target = two_images()
    half = preds_of(logits.bfloat16(), boxes)
    assert LOSS(half, target) == LOSS(preds_of(logits.bfloat16().float(), boxes), target)


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('truth, field, at, value, term', [
    (lambda t: t, 0, (1, 4, 1), NAN, "matching cost 'cls'"), # in the scores of a matched class
    (lambda t: t, 1, (1, 4, 1), INF, "matching cost 'l1'"),
    (lambda t: t, 1, (1, 4), 1e30, "matching cost 'giou'"),
    (empty, 1, (1, 4, 1), NAN, "matching cost 'l1'"),
    (lambda t: t, 0, (1, 4, 2), NAN, "loss 'cls'")]) # in another class
def test_what_cannot_be_computed_is_refused_by_name(truth, field, at, value, term):
    logits, boxes, target = two_images()
    three = [Pred(*[o.clone() for o in p]) for p in preds_of(logits, boxes) + preds_of(logits[:1], boxes[:1])]
    three[2][field][at] = value
    with pytest.raises(FloatingPointError, match=rf"{term} is not finite: supervised states \[2\], image ids \[8\]"):
        LOSS(three, truth(target))


def test_a_label_without_a_class():
    logits, boxes, target = two_images()
    with pytest.raises(ValueError, match=r'label 2 in images \[7, 8\], but the logits have 2 classes'):
        LOSS(preds_of(logits[..., :2], boxes), target)


def test_check_finite_is_silent_when_all_is_well():
    assert check_finite('loss', dict(cls=torch.zeros(3, 4)), torch.arange(4)) is None


def test_activation_and_decodes_read_the_last_prediction():
    logits, boxes, _ = two_images()
    preds = preds_of(logits, boxes)
    act = LOSS.activation(preds)
    assert torch.equal(act.boxes, preds[-1].boxes)
    assert torch.equal(LOSS.activation(preds[-1]).scores, act.scores) # a list of one arrives unwrapped
    for a, b in zip(LOSS.decodes(act), decode(preds[-1]), strict=True): assert torch.equal(a, b)
    assert decode(preds[0], 5).boxes.shape == (2, 5, 4)


def test_decode_in_order_and_of_as_many_pairs_as_there_are():
    logits, boxes, _ = two_images()
    every = sorted(((s, c, tuple(b)) for row, b in zip(logits[0, 0].sigmoid().tolist(), boxes[0, 0].tolist())
                    for c, s in enumerate(row)), reverse=True)
    det = decode(Pred(logits[0], boxes[0]))
    assert det.scores.shape == (2, 21) # fewer than 100 exist
    for i, (s, c, b) in enumerate(every):
        assert det.labels[0, i] == c and det.scores[0, i].item() == pytest.approx(s) and tuple(det.boxes[0, i].tolist()) == b


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
