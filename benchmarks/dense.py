"""A dense head of torchvision's FCOS on the neck of a detector, and first boxes from it; for the benchmarks of ideas."""
from functools import partial
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image, nms
from deqdet.training.denoise import noisy_state

STRIDES = 8, 16, 32


class Width(nn.Module):
    "All that torchvision's FCOS asks of a backbone whose features are computed elsewhere"
    def __init__(self, width):
        super().__init__()
        self.out_channels = width


def dense_head(n_classes, width):
    "A detector of torchvision for levels with these strides, of `width` channels"
    anchors = AnchorGenerator(tuple((s,) for s in STRIDES), ((1.,),)*3)
    head = FCOSHead(width, 1, n_classes, num_convs=1)
    return FCOS(Width(width), n_classes, anchor_generator=anchors, head=head)


def dense_loss(dense, feats, images, target):
    "torchvision's loss of the dense head on the pyramid's levels from stride 8 on"
    feats = list(feats[1:])
    shape = tuple(images.shape[-2:])
    anchors = dense.anchor_generator(ImageList(images, [shape]*len(images)), feats)
    keep = [l >= 0 for l in target.labels]
    truth = [dict(boxes=b[k], labels=l[k]) for b,l,k in zip(target.boxes, target.labels, keep)]
    counts = [f.shape[2]*f.shape[3] for f in feats]
    return sum(dense.compute_loss(truth, dense.head(feats), anchors, counts).values())


class DenseLoss(Callback):
    "Add the loss of the detector's dense head to the learner's"
    order = GradientClip.order - 1
    run_valid = False
    def before_fit(self): self.hook = self.model.pyramid.register_forward_hook(self.keep)
    def keep(self, module, args, feats): self.feats = feats if module.training else None
    def after_loss(self):
        if not self.training: return
        extra = dense_loss(self.model.dense, self.feats, self.xb[0], self.yb[0])
        self.learn.loss_grad = self.learn.loss_grad + extra
        self.learn.loss = self.learn.loss_grad.clone()
    def after_fit(self): self.hook.remove()


class FirstBoxes(nn.Module):
    """Queries of the grid, and more of them at the best boxes of a dense head.

    A further query has the learned content of the nearest query of the grid."""
    def __init__(self, grid, dense, n=50):
        super().__init__()
        self.grid = grid
        self.best = partial(best_boxes, dense, n=n) # no module: the head is a part of the detector already

    @property
    def state(self): return self.grid.state

    def forward(self, sizes, feats):
        first = self.grid(sizes, feats)
        more = noisy_state(first, self.best(sizes, feats), self.state.at)
        return type(first)(*[torch.cat(pair, 1) for pair in zip(first, more)])

    def preds(self, feats): return self.grid.preds(feats)


@torch.no_grad()
def best_boxes(dense, sizes, feats, n):
    "The `n` best boxes of a dense head after suppression, (B,n,4)"
    B,_,h,w = feats[0].shape
    images = ImageList(feats[0].new_empty(B, 3, 4*h, 4*w), sizes.tolist())
    out = dense.head(list(feats[1:]))
    scores = out['cls_logits'].sigmoid().amax(-1)*out['bbox_ctrness'].sigmoid()[..., 0] # (B,A)
    anchors = dense.anchor_generator(images, list(feats[1:]))
    found = []
    for score,reg,anchor,size in zip(scores, out['bbox_regression'], anchors, sizes.tolist()):
        boxes = clip_boxes_to_image(dense.box_coder.decode(reg, anchor), size)  # (A,4)
        low,high = boxes.split(2, -1)
        boxes = torch.cat([low, torch.maximum(high, low + 2)], -1)
        at = nms(boxes, score, .6)
        found.append(boxes[at.repeat(1 + n//len(at))[:n]])
    return torch.stack(found)
