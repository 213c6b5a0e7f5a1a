"benchmarks/peers.py: AP and milliseconds from the same calls"
import sys, time
from argparse import Namespace
from pathlib import Path
import pytest, torch
from deqdet.data import det_dls, synth_coco

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'))
import peers


class Knowing:
    "Gives the truth, or nothing, after so many seconds of the processor"
    def __init__(self, seconds, knows):
        self.seconds, self.knows, self.seen = seconds, knows, []

    def detect(self, images, sizes, target):
        until = time.process_time() + self.seconds
        while time.process_time() < until: pass
        self.seen += target.image_id.tolist()
        keep = [l.ge(0) & self.knows for l in target.labels]
        scale = (target.orig/sizes).flip(-1).repeat(1, 2)
        return [dict(boxes=b[k]*s, scores=torch.ones(int(k.sum())), labels=l[k])
                for b,l,k,s in zip(target.boxes, target.labels, keep, scale)]


def test_both_axes_from_one_pass(tmp_path):
    "Every image once with every way, after a warm-up of one turn; AP and ratios belong to their ways"
    data = synth_coco(tmp_path/'shapes', n_train=4, n_valid=5, size=64, seed=0)
    dls = det_dls(data, bs=1, val_bs=1, size=64, num_workers=0)
    ways = dict(first=Knowing(.002, True), blind=Knowing(.008, False))
    rows = peers.both(ways, dls, 2)
    ids = [t.image_id.item() for _,_,t in dls.valid]
    assert all(sorted(w.seen[2:])==sorted(ids) for w in ways.values())
    assert rows['first']['AP']==pytest.approx(1) and rows['blind']['AP']==0
    assert rows['first']['over_fcos']==1 and 2 < rows['blind']['over_fcos'] < 6
    assert rows['blind']['ms'] > 7.9


@pytest.mark.parametrize('asked,rate', [(0., 1e-3), (2e-3, 2e-3)])
def test_a_rate_that_is_asked_for(asked, rate, monkeypatch):
    "Without one, that of the detector"
    class Stop(Exception): pass
    def kind(vocab, args):
        assert args.lr==rate and args.opt=='adamw'
        raise Stop
    monkeypatch.setattr(peers, 'loaders', lambda args, bs: Namespace(vocab=['a']))
    monkeypatch.setitem(peers.KINDS, 'rtdetr', kind)
    with pytest.raises(Stop): peers.trained(Namespace(train='rtdetr', lr=asked, minutes=1.))


def test_a_peer_is_trained_and_kept(tmp_path, monkeypatch):
    "For some milliseconds, by the loop of `own_data.py`"
    data = synth_coco(tmp_path/'shapes', n_train=4, n_valid=2, size=64, seed=0)
    dls = det_dls(data, bs=2, val_bs=1, size=64, num_workers=0)
    class Point:
        clip = 1.
        def __init__(self, vocab, args): self.net = torch.nn.Linear(2, 1)
        def loss(self, images, sizes, target): return self.net(sizes.float()).square().mean()
    monkeypatch.setattr(peers, 'loaders', lambda args, bs: dls)
    monkeypatch.setitem(peers.KINDS, 'rtdetr', Point)
    file = tmp_path/'point.pt'
    n,_ = peers.trained(Namespace(train='rtdetr', lr=0., minutes=.002, size=64, save=file))
    kept = torch.load(file)
    assert n > 0 and kept['vocab']==list(dls.vocab) and kept['weights']['weight'].shape==(1, 2)
