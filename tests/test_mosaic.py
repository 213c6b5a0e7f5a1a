"Mosaics: what a window does to boxes, what stays an object, which batches of a training are mosaics"
import pytest, torch
from fastai.callback.core import Callback
from deqdet.data import det_dls, synth_coco
from deqdet.equilibrium import Settled
from deqdet.families.adamixer import AdaMixer
from deqdet.learner import det_learner
from deqdet.sets.images import Target, collate
from deqdet.sets.mosaic import Mosaic, four_in_one, mosaic, windowed
from deqdet.training.minutes import MANY, TimeBudget

SMALL = AdaMixer(n_classes=4, body='tiny', frozen_stages=-1, feat_width=32, norm_groups=8, n_queries=4, grid=(2,2,.4), width=32,
                 heads=4, groups=2, points=(4,), out_points=8, hidden=32, strategy=Settled(steps=1, supervise=(1,)))

def sample(h, w, boxes, i=0, value=100):
    "An image of one brightness, bright where its objects are"
    image = torch.full((3, h, w), value, dtype=torch.uint8)
    for x1, y1, x2, y2 in boxes: image[:, y1:y2, x1:x2] = 250
    return image, Target(torch.tensor(boxes, dtype=torch.float).reshape(-1, 4), torch.zeros(len(boxes), dtype=torch.long),
                         torch.tensor([h, w]), torch.tensor(i))

def test_a_window_moves_and_scales_boxes():
    image, t = sample(64, 64, [(16, 8, 32, 24)])
    part, boxes, labels = windowed(image, t, (8, 16, 32, 32), (64, 96))
    assert boxes.tolist() == [[0, 0, 48, 32]] and labels.tolist() == [0]
    assert part.shape == (3, 64, 96) and part[0, 5, 20] == 250 and part[0, 50, 80] == 100

@pytest.mark.parametrize('left, stays', [(20, True), (28, False), (40, False)])
def test_an_object_of_which_little_is_left_is_none(left, stays):
    _, boxes, _ = windowed(*sample(64, 64, [(16, 8, 32, 24)]), (0, left, 64, 24), (64, 24))
    assert len(boxes) == stays

@pytest.mark.parametrize('seed', range(8))
def test_boxes_lie_on_their_objects(seed):
    "Inside the image, and bright in the middle"
    torch.manual_seed(seed)
    hws = [(64, 96), (96, 64), (40, 40), (128, 100)]
    samples = [sample(h, w, [(4, 6, 20, 30), (22, 10, 36, 34)], i) for i, (h, w) in enumerate(hws)]
    image, t = four_in_one(samples)
    assert image.shape == (3, 64, 96) and t.image_id == 0
    assert (t.boxes[:, :2] < t.boxes[:, 2:]).all() and (t.boxes >= 0).all()
    assert (t.boxes <= torch.tensor([96, 64, 96, 64])).all()
    for x, y in ((t.boxes[:, :2] + t.boxes[:, 2:])/2).long().tolist(): assert image[0, y, x] > 200

@pytest.mark.parametrize('n', [1, 2, 5])
def test_a_batch_stays_a_batch(n):
    torch.manual_seed(0)
    batch = collate([sample(64, 60+i, [(4, 4, 40, 40)], i) for i in range(n)])
    images, sizes, t = mosaic(batch)
    assert images.shape == batch[0].shape and torch.equal(sizes, batch[1]) and torch.equal(t.image_id, batch[2].image_id)
    assert images.dtype == torch.uint8 and t.labels.max() == 0

def test_images_without_objects():
    torch.manual_seed(0)
    _, _, t = mosaic(collate([sample(64, 64, [], i) for i in range(4)]))
    assert (t.labels == -1).all()

class Looks(Callback):
    "Which batches are what the loader gave?"
    order = 90
    def before_fit(self): self.changed = []
    def before_batch(self):
        if not self.training: return
        ds = self.dls.train_ds
        place = {o['id']: i for i, o in enumerate(ds.images)}
        plain = [ds[place[k]][0] for k in self.yb[0].image_id.tolist()]
        self.changed.append(not all(torch.equal(a, b) for a, b in zip(self.xb[0], plain)))

def test_the_last_part_of_a_training_goes_without(tmp_path):
    path = synth_coco(tmp_path/'shapes', n_train=8, n_valid=2, size=64, seed=0)
    learn = det_learner(det_dls(path, 4, num_workers=0, device='cpu'), SMALL.build(), lr=1e-4, cbs=[Mosaic(1., last=.5), Looks()])
    with learn.quiet(): learn.fit(4)
    assert learn.looks.changed == [True]*4 + [False]*4
    assert learn.history.train_loss.notna().all()

def test_a_fit_that_ends_before_its_minutes_goes_without_too(tmp_path):
    "The budget allows eight batches of an hour"
    path = synth_coco(tmp_path/'shapes', n_train=8, n_valid=2, size=64, seed=0)
    budget = TimeBudget(60, most=8)
    learn = det_learner(det_dls(path, 4, num_workers=0, device='cpu'), SMALL.build(), lr=1e-4, cbs=[Mosaic(1., last=.5), Looks(), budget])
    with learn.quiet(): learn.fit(MANY)
    assert learn.looks.changed == [True]*4 + [False]*4
