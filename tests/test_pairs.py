"Pairs of frames: an earlier frame of each image, and a warm start from it in training"
from dataclasses import replace
import pytest, torch
from deqdet.data import det_dls, synth_coco
from deqdet.equilibrium import Settled
from deqdet.evaluate import APCallback
from deqdet.families.adamixer import AdaMixer
from deqdet.learner import det_learner
from deqdet.training.denoise import Denoise
from deqdet.training import pairs
from deqdet.training.pairs import Pairs, _copied, earlier, warm_state
from deqdet.training.watch import TermRecorder

SMALL = AdaMixer(n_classes=4, body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=9, grid=(3,3,.4), width=32, heads=4,
                 groups=2, points=(4,), out_points=8, hidden=64, strategy=Settled(steps=3, supervise=(3,), init_steps=0, perturb=None))

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return synth_coco(tmp_path_factory.mktemp('p')/'shapes', n_train=8, n_valid=4, size=64, seed=1)

def fitted(folder, *cbs):
    torch.manual_seed(0)
    dls = det_dls(folder, bs=4, num_workers=0, device='cpu')
    learn = det_learner(dls, SMALL.build(), 'tiny', cbs=list(cbs))
    learn.remove_cb(APCallback)
    with learn.quiet(): learn.fit(1)
    return learn

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def still(images, sizes, target): return images.clone()

def test_without_weight_training_is_the_same_bit_for_bit(folder):
    plain = fitted(folder)
    off = fitted(folder, Pairs(0.))
    assert torch.equal(weights(plain), weights(off))
    assert plain.term_recorder.values==off.term_recorder.values, 'the terms are those of the main loss'
    assert not off.model.pyramid._forward_hooks

def test_beside_denoising(folder):
    alone,both = fitted(folder, Denoise(2)), fitted(folder, Denoise(2), Pairs(1.))
    assert not torch.equal(weights(alone), weights(both))

def batch(folder): return det_dls(folder, bs=4, num_workers=0, device='cpu').valid.one_batch()

def test_no_change_is_the_image(folder):
    images,sizes,target = batch(folder)
    assert torch.equal(earlier(images, sizes, target, shift=0., zoom=0., change=0.), images)
    torch.manual_seed(0)
    frames = earlier(images, sizes, target)
    assert frames.shape==images.shape and frames.dtype==images.dtype and not torch.equal(frames, images)

def test_copies_stay_inside():
    image = torch.arange(3*8*8).view(3, 8, 8).float()
    moved = image.clone()
    _copied(moved, (1, 1, 4, 4), (6, 6))
    assert torch.equal(moved[:, 6:, 6:], image[:, 1:3, 1:3]) and torch.equal(moved[:, :6], image[:, :6])
    same = image.clone()
    _copied(same, (1, 1, 0, 3), (2, 2))
    assert torch.equal(same, image)

def test_warm_state_batch_equals_single(folder):
    torch.manual_seed(0)
    model = SMALL.build().train()
    images,sizes,target = batch(folder)
    whole = warm_state(model, images, sizes, None)
    assert model.training
    for i in range(len(images)):
        one = warm_state(model, images[i:i+1], sizes[i:i+1], None)
        for a,b in zip(one, whole): torch.testing.assert_close(a[0], b[i], rtol=1e-4, atol=1e-3)

def test_queries_without_an_object_start_afresh(folder):
    torch.manual_seed(0)
    model = SMALL.build()
    images,sizes,_ = batch(folder)
    state,feats = model.start(images, sizes)
    fresh = type(state)(*[torch.full_like(p, -1.) for p in state])
    none = warm_state(model, images, sizes, fresh, take=1.1)
    every = warm_state(model, images, sizes, fresh, take=0.)
    assert all(torch.equal(a, b) for a,b in zip(none, fresh))
    assert all(torch.equal(a, b) for a,b in zip(every, warm_state(model, images, sizes, None)))

def test_earlier_frame_has_as_many_applications_as_drawn(folder, monkeypatch):
    seen = []
    def counted(model, frames, sizes, fresh, take=.4, settled=None):
        seen.append(settled)
        return warm_state(model, frames, sizes, fresh, take, settled)
    monkeypatch.setattr(pairs, 'warm_state', counted)
    fitted(folder, Pairs(settled=(2, 3)))
    fitted(folder, Pairs(settled=(7, 7)))
    fitted(folder, Pairs(settled=None))
    assert set(seen[:2]) <= {2, 3} and seen[2:]==[7, 7, None, None]

def test_number_of_applications_on_the_earlier_frame(folder):
    torch.manual_seed(0)
    model = SMALL.build().eval()
    images,sizes,_ = batch(folder)
    path = model.trajectory(images, sizes)
    for k in (1, 3):
        for a,b in zip(warm_state(model, images, sizes, None, settled=k), path[k][0]): torch.testing.assert_close(a, b)
    usual = warm_state(model, images, sizes, None)
    for a,b in zip(usual, path[-1][0]): torch.testing.assert_close(a, b)
