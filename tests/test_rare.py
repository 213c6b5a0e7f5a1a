"Images with rare classes come more often: the rule of LVIS, and loaders that heed it"
import math
from types import SimpleNamespace
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from deqdet.data import DetDL, det_dls, synth_coco
from deqdet.sets.rare import repeat_factors, repeated

class Set(SimpleNamespace):
    "Images that show these classes"
    def __init__(self, images, n_classes):
        ends = torch.tensor([0, *map(len, images)]).cumsum(0)
        labels = torch.tensor([k for o in images for k in o], dtype=torch.long)
        super().__init__(vocab=list(range(n_classes)), labels=labels, ends=ends)
    def __len__(self): return len(self.ends)-1

class Largest(TorchDispatchMode):
    "The numbers of the largest tensor that any operation makes"
    numbers = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(o.numel() for o in (out if isinstance(out, tuple) else [out]) if isinstance(o, torch.Tensor)), 0)
        return out

def test_the_rarest_class_of_an_image_decides():
    "Class 1 is in 1 of 8 images, class 2 in 2; several objects of a class count once"
    ds = Set([[0], [0,0], [0], [0,1,1], [0,2], [2], [], [0]], 3)
    f = repeat_factors(ds, .5)
    assert f.tolist() == pytest.approx([1, 1, 1, 2, math.sqrt(2), math.sqrt(2), 1, 1])
    assert repeat_factors(ds, .01).tolist() == [1]*8

def test_a_class_that_no_image_shows_changes_nothing(): assert repeat_factors(Set([[0], [0]], 5), .9).tolist() == [1, 1]

def test_memory_grows_with_the_objects():
    "20,000 images of 1203 classes: a table of images and classes would hold 24 million"
    n = 20_000
    ds = Set([], 1203)
    ds.labels, ds.ends = torch.arange(3*n) % 1203, torch.arange(0, 3*n + 1, 3)
    with Largest() as seen: f = repeat_factors(ds, .01)
    assert len(f) == n and seen.numbers <= 6*n

@pytest.mark.parametrize('rare', [.05, .3, .9])
def test_each_comes_as_often_as_its_factor_says(rare):
    torch.manual_seed(0)
    ds = Set([[k for k in range(6) if torch.rand(()) < .6**(k+1)] for _ in range(50)], 6)
    f, numbers = repeat_factors(ds, rare), repeated(ds, rare)
    counts = torch.bincount(torch.tensor(numbers), minlength=50)
    assert len(numbers) == round(f.sum().item()) and numbers == sorted(numbers)
    assert (counts >= f.floor()).all() and (counts <= f.ceil()).all()

@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return synth_coco(tmp_path_factory.mktemp('rare')/'shapes', n_train=12, n_valid=3, size=64, seed=0)

def seen(dl): return torch.cat([b[2].image_id for b in dl]).tolist()

def test_loaders_deal_them_several_times(shapes):
    "In the training loader alone; with its own augmentation for each copy; and an epoch can be begun in the middle"
    def noise(image, t): return (image*torch.rand(())).to(torch.uint8), t
    dls = det_dls(shapes, 2, tfms=(noise, None), rare=.99, num_workers=0, device='cpu')
    expected = repeated(dls.train_ds, .99)
    ids = [o['id'] for o in dls.train_ds.images]
    assert len(expected) > 12 and len(dls.train) == len(expected)//2
    order = seen(dls.train)
    assert set(order) <= set(ids) and len(order) == 2*(len(expected)//2)
    dl = DetDL(dls.train_ds, 1, chosen=[3, 3], device='cpu')
    a, b = (o[0] for o in dl)
    assert not torch.equal(a, b)
    dls.train.set_epoch(0, 4)
    assert seen(dls.train) == order[4:]
    assert len(seen(dls.valid)) == 3
    assert len(dls.test_dl([shapes/'images'/'train_00000.jpg'], num_workers=0)) == 1

def test_without_rare_classes_nothing_changes(shapes):
    plain, same = (det_dls(shapes, 2, rare=r, num_workers=0, device='cpu') for r in (None, .001))
    assert seen(plain.train) == seen(same.train)


def test_a_rare_class_below_the_threshold_comes_twice():
    ds = Set([[0]]*9 + [[0, 1]], 2)
    assert repeat_factors(ds, .4).tolist()==[1]*9 + [2]
    assert repeated(ds, .4)==[*range(10), 9] and repeated(ds, .1)==[*range(10)]
