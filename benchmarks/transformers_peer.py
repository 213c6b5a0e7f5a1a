"""RT-DETR v2 and D-FINE of transformers, trained as `own_data.py` trains: the same body, loaders, minutes and measure

    python benchmarks/transformers_peer.py --all --sets bccd --minutes 10 --out own.json
    python benchmarks/transformers_peer.py --set bccd --kind rtdetr --opt adamw --lr 1e-3 --wd 1e-4 --minutes 10

The command line is that of `own_data.py`, whose kinds stand here too. `pip install transformers` (the extra
`bench`) brings the two models: loss, denoising and post-processing are their own. Their sizes are near
`deqdet_lite`'s: 100 queries, width 128, three decoder layers. The body is EfficientNet-Lite0 of the others, with
levels of strides 8, 16 and 32. Layers begin as PyTorch makes them, as in the authors' code: transformers begins
with BatchNorms of nearly 0, for it expects a checkpoint."""
from functools import partial
from types import SimpleNamespace
import torch
from torch import nn
from torchvision.ops import box_convert
from deqdet.backbone import create_body, inside
import own_data
from own_data import BODY, KINDS


class Levels(nn.Module):
    "The body of the other detectors, where transformers has its own"
    def __init__(self, frozen):
        super().__init__()
        self.body = create_body(BODY, pretrained=True, frozen_stages=frozen)

    def forward(self, x): return SimpleNamespace(feature_maps=self.body(x)[1:])


BASIC = nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm

def begin(net):
    "Weights as PyTorch makes them; layers that need other ones get the model's own"
    for m in net.modules():
        if isinstance(m, BASIC): m.reset_parameters()
    for m in net.modules():
        if not isinstance(m, BASIC): net._init_weights(m)


def options(n_classes):
    "Sizes near those of `deqdet_lite`, and what both models share"
    from transformers import TimmBackboneConfig
    body = TimmBackboneConfig(backbone=BODY, out_indices=[2, 3, 4]) # tells channels; then replaced
    width = dict(d_model=128, encoder_hidden_dim=128, encoder_ffn_dim=512, decoder_ffn_dim=512,
                 encoder_attention_heads=4, decoder_attention_heads=4, hidden_expansion=.5)
    levels = dict(encoder_in_channels=[40, 112, 320], decoder_in_channels=[128]*3, feat_strides=[8, 16, 32])
    return dict(backbone_config=body, num_labels=n_classes, num_queries=100, decoder_layers=3,
                freeze_backbone_batch_norms=False, tie_word_embeddings=False, **width, **levels)


def made(kind, n_classes, frozen):
    "A detector of transformers on our body"
    import transformers
    family = dict(rtdetr='RTDetrV2', dfine='DFine')[kind]
    config = getattr(transformers, f'{family}Config')(**options(n_classes))
    net = getattr(transformers, f'{family}ForObjectDetection')(config)
    begin(net)
    del net.class_embed, net.bbox_embed # the decoder has copies, which it uses
    net.model.backbone.model = Levels(frozen)
    return net


class TransformersPeer:
    "A detector of transformers"
    clip = .1

    def __init__(self, kind, vocab, args):
        from transformers import RTDetrImageProcessor
        self.net = made(kind, len(vocab), args.frozen)
        self.post = RTDetrImageProcessor().post_process_object_detection

    def pixels(self, images, sizes):
        "Images as the body has learned them, 0 on padding"
        padding = ~inside(sizes, *images.shape[-2:])[:, None]
        return ((images.float()/255 - .5)/.5).masked_fill(padding, 0)

    def truth(self, images, target):
        "For each image classes, and boxes as parts of the padded image"
        h,w = images.shape[-2:]
        parts = box_convert(target.boxes, 'xyxy', 'cxcywh')/torch.tensor([w, h, w, h])
        keep = target.labels >= 0
        return [dict(class_labels=l[k], boxes=b[k]) for l,b,k in zip(target.labels, parts, keep)]

    def loss(self, images, sizes, target):
        return self.net(self.pixels(images, sizes), labels=self.truth(images, target)).loss

    def detect(self, images, sizes, target):
        out = self.net(self.pixels(images, sizes))
        padded = torch.tensor([images.shape[-2:]]*len(images))
        found = self.post(out, threshold=0., target_sizes=padded)
        scale = (sizes/target.orig).flip(-1).repeat(1, 2)
        return [dict(d, boxes=d['boxes']/s) for d,s in zip(found, scale)]


RATES = dict.fromkeys(('rtdetr', 'dfine'), dict(opt='adamw', lr=1e-3, wd=1e-4)) # of 5e-4 and 1e-3 the better one on bccd, for both
KINDS |= {k: partial(TransformersPeer, k) for k in ('rtdetr', 'dfine')}


if __name__=='__main__': own_data.main(kinds='rtdetr,dfine')
