"Properties of boxes over many random inputs, and records that travel between processes"
import copy, math, pickle
import pytest, torch
from torch.autograd import gradcheck
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_area, box_iou, generalized_box_iou
from deqdet.boxes import (Record, area, cxcywh_to_xyxy, giou, intersection, iof, iou, move, pairs, xyxy_to_cxcywh, xyxy_to_xyzr,
    xyzr_to_xyxy)


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


@pytest.mark.skipif(not hasattr(torch.utils._pytree, 'is_namedtuple_instance'),
                    reason='this torch takes only direct subclasses of tuple for named tuples, as 2.6 does')
def test_record_is_a_named_tuple_to_torch():
    from torch.utils._pytree import tree_map
    out = tree_map(lambda x: x + 1, Samples()[1])
    assert type(out) is Sample and out.label == 2


# what stood in the page, and more of it than a reader needs

THINGS = torch.tensor([[130., 89, 230, 141], [46, 42, 74, 58]])
TWISTED = torch.tensor([[0., 0, 10, 20], [10, 0, 0, 20], [10, 20, 0, 0], [5, 5, 5, 5]])   # proper, inverted once, twice, empty
PAD = torch.zeros(1, 4)


def positions(seed=1, n=50):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64)*torch.tensor([200, 200, 2, 1]) + torch.tensor([400, 300, 5, 0])


def deltas(seed=2, n=50):
    return torch.randn(2, n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, eps=1e-5): return torch.allclose(a, b, rtol=0, atol=eps)


def test_encoding_by_the_formula_alone_breaks_on_an_inverted_box():
    "Two corners shaken by the 25 pixels of DEQDet's training: why `xyxy_to_xyzr` has guards"
    shaken = THINGS + 25*torch.randn(2, 4, generator=torch.Generator().manual_seed(56))
    w, h = (shaken[:, 2:] - shaken[:, :2]).unbind(-1)
    naive = torch.stack([(w.log2() + h.log2())/2, h.log2() - w.log2()], -1)
    assert naive.isnan().any(-1).tolist() == [False, True]
    assert (shaken[1, 2:] < shaken[1, :2]).any()
    assert xyxy_to_xyzr(shaken).isfinite().all()


def test_points_and_lines_have_a_finite_code_and_gradient():
    flat = torch.tensor([[50., 60, 50, 60], [50, 60, 90, 60]], requires_grad=True)
    code = xyxy_to_xyzr(flat)
    assert close(code[0], torch.tensor([50, 60, math.log2(1e-7), 0]), 1e-4)
    assert close(xyzr_to_xyxy(code), flat, 1e-3)
    code.sum().backward()
    assert flat.grad.isfinite().all()


def test_one_number_halves_boxes_of_any_size():
    cxcywh = xyxy_to_cxcywh(THINGS)*torch.tensor([1, 1, 2, 2])
    guess = xyxy_to_xyzr(cxcywh_to_xyxy(cxcywh))
    assert close(xyzr_to_xyxy(move(guess, torch.tensor([0, 0, -1., 0]))), THINGS, 1e-3)


def test_the_shape_leaves_the_area_alone():
    p = draw(0).double()
    boxes = xyzr_to_xyxy(p)
    assert torch.allclose(box_area(boxes), 4**p[:, 2], rtol=1e-6)


def test_centres_and_corners_are_two_forms_of_a_box():
    boxes = xyzr_to_xyxy(draw(1).double())
    assert close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes, 1e-9)


def test_there_is_a_delta_to_any_goal():
    start, goal = positions(3), positions(4)
    d = goal - start
    needed = torch.cat([d[:, :2]/2**start[:, 2:3], d[:, 2:]], -1)
    assert close(move(start, needed), goal, 1e-9)


def test_moves_are_a_group():
    p, (d, e) = positions(), deltas()
    then = torch.cat([d[:, :2] + e[:, :2]*2**d[:, 2:3], d[:, 2:] + e[:, 2:]], -1)
    undo = torch.cat([-d[:, :2]*2**-d[:, 2:3], -d[:, 2:]], -1)
    assert close(move(move(p, d), e), move(p, then), 1e-9)
    assert close(move(move(p, d), undo), p, 1e-9)
    assert torch.equal(move(p, 0*d), p)


def test_moves_commute_with_scaling_and_shifting_the_picture():
    p, (d, _) = positions(), deltas()
    def rescale(p): return torch.cat([p[:, :2]*3 + 20, p[:, 2:3] + math.log2(3), p[:, 3:]], -1)
    assert close(move(rescale(p), d), rescale(move(p, d)), 1e-9)
    assert close(xyzr_to_xyxy(rescale(p)), xyzr_to_xyxy(p)*3 + 20, 1e-9)


def test_pairs_line_up_in_every_picture():
    a, b = pairs(torch.zeros(7, 3, 4), torch.zeros(7, 5, 4))
    assert a.shape == (7, 3, 1, 4) and b.shape == (7, 1, 5, 4)


def test_areas_are_signed():
    assert torch.equal(area(TWISTED), box_area(TWISTED)) and area(TWISTED).tolist() == [200, -200, 200, 0]


def test_boxes_that_miss_each_other_share_nothing_nor_do_inverted_ones():
    assert intersection(torch.tensor([0., 0, 10, 10]), torch.tensor([20., 20, 30, 30])) == 0
    assert torch.equal(intersection(*pairs(TWISTED, TWISTED)), torch.diag(torch.tensor([200., 0, 0, 0])))


def test_overlaps_of_empty_boxes_are_numbers_where_torchvisions_are_not():
    assert box_iou(PAD, PAD).isnan().all() and generalized_box_iou(PAD, PAD).isnan().all()
    assert iou(PAD, PAD) == 0 and giou(PAD, PAD).isfinite().all() and giou(PAD, THINGS[:1]) < 0


def test_overlap_knows_neither_place_nor_size_nor_order():
    q = xyzr_to_xyxy(positions())
    assert close(iou(q[:25], q[25:]), iou(q[25:], q[:25]))
    assert close(iou(*pairs(q*3 + 20, q*3 + 20)), iou(*pairs(q, q)), 1e-9)
    assert close(iou(q, q), torch.ones(50, dtype=q.dtype))


def test_intersection_over_foreground_is_not_symmetric():
    outer, inner, q = torch.tensor([0., 0, 100, 100]), torch.tensor([20., 20, 30, 30]), xyzr_to_xyxy(positions())
    assert close(iof(inner, outer), torch.tensor(1.)) and close(iof(outer, inner), torch.tensor(.01))
    assert close(iof(q[:25], q[25:])*area(q[:25]), iof(q[25:], q[:25])*area(q[25:]), 1e-6)


def test_cover_of_inverted_and_empty_boxes_is_zero_their_own_place_included():
    shaken = THINGS + 25*torch.randn(2, 4, generator=torch.Generator().manual_seed(56))
    mess = torch.cat([shaken, TWISTED])
    assert (intersection(*pairs(mess, mess))/area(mess)[:, None]).isnan().any()   # without the clamp
    cover = iof(*pairs(mess, mess))
    assert cover.diagonal().tolist() == [1, 0, 1, 0, 0, 0]
    assert ((cover >= 0) & (cover <= 1)).all()
    assert cover[[1, 3, 4, 5]].abs().sum() == 0


def test_only_giou_has_a_gradient_between_boxes_that_miss_each_other():
    lost = torch.tensor([10., 150, 30, 170], requires_grad=True)
    iou(lost, THINGS[0]).backward()
    assert lost.grad.abs().sum() == 0
    giou(lost, THINGS[0]).backward()
    assert lost.grad.abs().sum() > 0 and lost.grad[0] > 0 and lost.grad[1] < 0   # right and up, to the bus


def test_giou_is_at_most_iou_and_equal_to_it_where_the_hull_has_no_empty_part():
    q = xyzr_to_xyxy(positions())
    assert (giou(*pairs(q, q)) <= iou(*pairs(q, q)) + 1e-12).all()
    outer, inner = torch.tensor([0., 0, 100, 100]), torch.tensor([20., 20, 30, 30])
    assert close(giou(outer, inner), iou(outer, inner))


def test_gradients_equal_finite_differences():
    p, d = positions()[:12], deltas()[0, :6].requires_grad_()
    x, y = (xyzr_to_xyxy(p)[i:i+6].detach().requires_grad_() for i in (0, 6))
    pos = p[:6].clone().requires_grad_()
    for f, args in [(xyzr_to_xyxy, (pos,)), (xyxy_to_xyzr, (x,)), (move, (pos, d)), (area, (x,))]: assert gradcheck(f, args)
    for f in (intersection, iou, iof, giou): assert gradcheck(f, (x, y))


@pytest.mark.parametrize('f', [iou, iof, giou])
def test_gradients_of_empty_boxes_are_finite(f):
    empty, other = torch.zeros(3, 4, requires_grad=True), THINGS[:1].repeat(3, 1)
    (f(empty, other) + f(empty, empty)).sum().backward()
    assert empty.grad.isfinite().all()


def test_half_precision_is_not_enough():
    big = torch.tensor([0., 0, 300, 300])
    assert torch.tensor(1203.).bfloat16().item() == 1200
    assert area(big.half()).item() == float('inf') and area(big).item() == 90000


# records

class Found(Record):
    logits: torch.Tensor # (N,K)
    boxes: torch.Tensor  # (N,4)


def same(x, y): return type(x) is Found and all(torch.equal(i, j) for i, j in zip(x, y, strict=True))


def test_every_way_of_building_a_record_gives_the_same_one():
    found = Found(torch.zeros(2), THINGS)
    logits, boxes = found
    assert found.boxes is found[1] is boxes
    for x in (Found([*found]), Found((*found,)), Found(i for i in found), Found._make(found), Found(logits=logits, boxes=boxes)):
        assert same(x, found)


def test_every_tool_that_takes_a_record_apart_puts_it_together_again():
    from fastai.torch_core import to_detach
    from torch.utils.data import default_collate, default_convert
    found = Found(torch.zeros(2), THINGS)
    for rebuild in (to_detach, default_convert, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))): assert same(rebuild(found), found)
    assert default_collate([found, found]).boxes.shape == (2, 2, 4)


def test_named_tuples_and_tuples_of_lists_serve_one_library_each():
    "Why there is a `Record`"
    from typing import NamedTuple
    from fastai.torch_core import to_detach
    from torch.utils.data import default_convert
    Plain = NamedTuple('Plain', [('logits', torch.Tensor), ('boxes', torch.Tensor)])
    class Listed(tuple): pass
    with pytest.raises(TypeError, match='missing 1 required positional argument'): to_detach(Plain(torch.zeros(2), THINGS))
    assert type(default_convert(Listed([torch.zeros(2), THINGS]))) is list


def test_a_record_is_replaced_never_changed_and_refuses_what_does_not_fit_by_name():
    found = Found(torch.zeros(2), THINGS)
    assert found._replace(boxes=THINGS[:1]).boxes.shape == (1, 4) and found.boxes.shape == (2, 4)
    for build, says in [(lambda: Found(THINGS), r"missing=\['boxes'\]"), (lambda: Found([1, 2, 3]), '3 given in order'),
                        (lambda: Found(found.logits, boxs=THINGS), r"given twice=\['boxs'\]"), (lambda: found._replace(boxs=THINGS), r"\['boxs'\]")]:
        with pytest.raises(TypeError, match=says): build()
    with pytest.raises(AttributeError): found.boxes = THINGS
