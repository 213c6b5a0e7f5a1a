"Class targets that grow with the overlap"
import pytest, torch
import torch.nn.functional as F
from torch import tensor
from torchvision.ops import box_iou
from deqdet.data import Target
from deqdet.decoder import Pred
from deqdet.learner import recipes
from deqdet.boxes import iou
from deqdet.loss import SetLoss, focal_loss
from deqdet.training.quality import OverlapScores, with_overlap


def scene(dtype=torch.float64):
    "Two states of five queries on two images, one without an object"
    torch.manual_seed(0)
    low = torch.rand(2, 2, 5, 2, dtype=dtype)*40
    boxes = torch.cat([low, low + 20 + 20*torch.rand(2, 2, 5, 2, dtype=dtype)], -1)
    logits = torch.randn(2, 2, 5, 3, dtype=dtype)
    truth = tensor([[[10., 10, 40, 40], [30, 30, 70, 60]], [[0, 0, 0, 0]]*2])
    target = Target(truth, tensor([[0, 2], [-1, -1]]), tensor([[80, 80]]*2), tensor([1, 2]), tensor([[80, 80]]*2))
    return logits, boxes, target


def plain(logits, at, overlap, part=.75):
    "The same, score by score"
    loss = torch.zeros_like(logits)
    positive = {tuple(i): u for i,u in zip(at.T.tolist(), overlap.tolist())}
    for i in torch.cartesian_prod(*map(torch.arange, logits.shape)).tolist():
        i = tuple(i)
        p = logits[i].detach().sigmoid()
        t = p**(1-part)*positive[i]**part if i in positive else torch.zeros_like(p)
        weight = 1 if i in positive else p**2
        loss[i] = weight*F.binary_cross_entropy_with_logits(logits[i], t)
    return loss


@pytest.mark.parametrize('part', (.5, .75, 1.))
def test_equals_the_plain_version_with_its_gradient(part):
    logits,*_ = scene()
    at = tensor([[0, 1, 1], [0, 0, 1], [2, 3, 4], [0, 2, 1]])
    overlap = tensor([.2, .7, 0.], dtype=torch.float64)
    a = logits.clone().requires_grad_()
    b = logits.clone().requires_grad_()
    mine = OverlapScores(part)(a, at, overlap)
    want = plain(b, at, overlap, part)
    torch.testing.assert_close(mine, want)
    mine.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_rests_where_the_score_is_the_overlap():
    overlap = tensor([.1, .5, .9], dtype=torch.float64)
    logits = overlap.logit().view(1, 1, 3, 1).requires_grad_()
    at = tensor([[0]*3, [0]*3, [0, 1, 2], [0]*3])
    OverlapScores()(logits, at, overlap).sum().backward()
    assert logits.grad.abs().max() < 1e-12


def test_overlap_is_the_diagonal_of_torchvisions():
    torch.manual_seed(0)
    a,b = (torch.rand(50, 2, 2).mul(100).sort(1).values.flatten(1) for _ in range(2))
    torch.testing.assert_close(iou(a, b), box_iou(a, b).diagonal())
    flat = tensor([[5., 5, 5, 9]])
    assert iou(flat, flat)==0


def test_set_loss_off_means_as_before():
    logits,boxes,target = scene(torch.float32)
    preds = [Pred(l, b) for l,b in zip(logits, boxes)]
    same = SetLoss(scoring=lambda logits, at, overlap: focal_loss(logits, at))
    assert torch.equal(SetLoss()(preds, target), same(preds, target))


def test_set_loss_with_overlap_trains_scores_only_through_logits():
    logits,boxes,target = scene()
    loss = with_overlap(SetLoss(w_l1=0., w_giou=0.))
    assert loss.w_cls==1
    boxes.requires_grad_()
    logits.requires_grad_()
    preds = [Pred(l, b) for l,b in zip(logits, boxes)]
    loss(preds, target).backward()
    assert boxes.grad is None or not boxes.grad.any()
    assert logits.grad.abs().sum() > 0


def test_batch_equals_single():
    logits,boxes,target = scene()
    loss = with_overlap(SetLoss(reduction='none'))
    preds = [Pred(l, b) for l,b in zip(logits, boxes)]
    both = loss(preds, target)
    first = [Pred(l[:1], b[:1]) for l,b in zip(logits, boxes)]
    alone = loss(first, Target(*[t[:1] for t in target]))
    torch.testing.assert_close(both[:1], alone)


def test_published_recipes_keep_the_focal_loss():
    assert recipes['finetune'].overlap
    assert not any(r.overlap for k,r in recipes.items() if k != 'finetune')
