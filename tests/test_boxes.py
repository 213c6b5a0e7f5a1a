"Properties of boxes over many random inputs, and records that travel between processes"
import copy, pickle
import pytest, torch
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_iou, generalized_box_iou
from deqdet.boxes import Record, giou, iof, iou, move, pairs, xyxy_to_xyzr, xyzr_to_xyxy


class Sample(Record):
    boxes: torch.Tensor # (M,4)
    label: torch.Tensor # ()


class Samples(Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): return Sample(torch.full((2, 4), float(i)), torch.tensor(i))


def draw(seed, n=400):
    "Random positions, from 2 pixels to 1300"
    g = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(n, 2, generator=g)*1300, torch.rand(n, 1, generator=g)*8 + 1.5, torch.randn(n, 1, generator=g)], -1)


@pytest.mark.parametrize('seed', range(5))
def test_round_trip(seed):
    p = draw(seed)
    # a side of s pixels at x = 1300 is known to 2.4e-4/s of itself in float32
    tol = 1e-3/(2**(p[:, 2] - p[:, 3].abs()/2)) + 1e-5
    back = xyxy_to_xyzr(xyzr_to_xyxy(p))
    assert ((back - p)[:, :2].abs() < 1e-3).all()
    assert ((back - p)[:, 2:].abs() < tol[:, None]).all()
    assert torch.allclose(xyxy_to_xyzr(xyzr_to_xyxy(p.double())), p.double(), atol=2e-6)


@pytest.mark.parametrize('seed', range(5))
def test_overlaps_are_torchvisions(seed):
    a,b = [xyzr_to_xyxy(draw(seed + k)) for k in (10, 20)]
    assert torch.allclose(iou(*pairs(a, b)), box_iou(a, b), atol=1e-6)
    assert torch.allclose(giou(*pairs(a, b)), generalized_box_iou(a, b), atol=1e-5)
    assert torch.equal(iou(a, b), iou(*pairs(a, b)).diagonal())


@pytest.mark.parametrize('seed', range(5))
def test_noise_never_breaks(seed):
    "25 pixels on each corner, as training adds them: encoding, moving and the attention's overlap stay finite"
    g = torch.Generator().manual_seed(seed)
    noisy = xyzr_to_xyxy(draw(seed)) + 25*torch.randn(400, 4, generator=g)
    inverted = (noisy[:, 2:] < noisy[:, :2]).any(-1)
    assert inverted.any()
    cover = iof(*pairs(noisy, noisy))
    assert cover.isfinite().all() and (cover >= 0).all() and (cover <= 1 + 1e-6).all()
    assert (cover[inverted] == 0).all() and (cover[:, inverted] == 0).all()
    assert move(xyxy_to_xyzr(noisy), torch.randn(400, 4, generator=g)).isfinite().all()


@pytest.mark.parametrize('workers', [0, 1])
def test_record_through_a_loader(workers):
    kw = dict(multiprocessing_context='spawn') if workers else {}
    batches = list(DataLoader(Samples(), batch_size=3, num_workers=workers, **kw))
    assert [type(b) for b in batches] == [Sample, Sample]
    assert batches[1].label.tolist() == [3, 4, 5] and batches[1].boxes.shape == (3, 2, 4)


def test_record_copies():
    s = Samples()[3]
    for t in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s), copy.copy(s), Sample(list(s)), Sample(*s)):
        assert type(t) is Sample and torch.equal(t.boxes, s.boxes) and t.label == 3


@pytest.mark.parametrize('fields', [(), (1,), ([1],), (1, 2, 3), ([1, 2, 3],)])
def test_record_refuses_a_wrong_number_of_fields(fields):
    with pytest.raises(TypeError, match='Sample has fields'): Sample(*fields)


def test_record_inherits_fields():
    class Named(Sample):
        name: str
    assert Named._fields == ('boxes', 'label', 'name') and Named(1, 2, name='x').name == 'x'


def test_record_is_a_named_tuple_to_torch():
    from torch.utils._pytree import tree_map
    out = tree_map(lambda x: x + 1, Samples()[1])
    assert type(out) is Sample and out.label == 2
