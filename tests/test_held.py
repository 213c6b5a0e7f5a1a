"Warm start: identities in a toy world, batch against single, doubles, lost objects"
from types import SimpleNamespace
import pytest, torch
from torch import nn
from deqdet.boxes import xyxy_to_xyzr
from deqdet.decoder import Pred, State
from deqdet.equilibrium import Equilibrium, Settled
from deqdet.loss import decode
from deqdet.ops.errors import CommandError
from deqdet.using.held import Follower, Hold, Look, Slots, advance, best_pairs, blend, single
from deqdet.zoo import create_detector

SIDE = 96
class See(nn.Module):
    """A step of a toy: a query's content is a colour, and its box goes to the pixels of that colour near it.
    A query without a colour (0) takes the most frequent one in its box."""
    def forward(self, state, feats):
        image, = feats # (B,3,H,W)
        rows = [self.one(c, p, image[b]) for b in range(len(image)) for c,p in zip(state.content[b], state.xyzr[b])]
        B,N = state.content.shape[:2]
        return State(*(torch.stack(o).view(B, N, -1) for o in zip(*rows)))
    def one(self, colour, xyzr, image):
        x,y = xyzr[:2]
        ys,xs = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing='ij')
        near = ((xs-x).abs() < 14) & ((ys-y).abs() < 14)
        lit = near & (image.sum(0) > 0)
        if not colour.any():
            if not lit.any(): return colour, xyzr
            colour = image[:, lit].T.unique(dim=0, return_counts=True)
            colour = colour[0][colour[1].argmax()]
        mine = near & (image == colour[:, None, None]).all(0)
        if mine.sum() < 8: return colour, xyzr
        at = torch.stack([xs[mine].float().mean(), ys[mine].float().mean()])
        return colour, torch.cat([at, xyzr[2:]])
    def read(self, state):
        boxes = state.boxes
        score = torch.where(state.content.any(-1, keepdim=True), 4., -4.)
        image = self.image
        for b in range(len(boxes)): # a query whose colour is not in its box finds nothing
            for i,(x1,y1,x2,y2) in enumerate(boxes[b].round().int().clamp(min=0).tolist()):
                part = image[b, :, y1:y2, x1:x2]
                share = (part == state.content[b, i, :, None, None]).all(0).float().mean() if part.numel() else torch.tensor(0.)
                if not share > .3: score[b, i] = -4.
        return Pred(score, boxes)

class Toy(nn.Module):
    "A detector of coloured squares; its queries start on a grid without a colour"
    vocab = ['square']
    def __init__(self):
        super().__init__()
        self.step = See()
        self.decoder = Equilibrium(self.step, self.step, Settled(steps=2, supervise=()))
    def start(self, images, sizes=None):
        self.step.image = images
        c = torch.arange(6)*16. + 8
        y,x = torch.meshgrid(c, c, indexing='ij')
        centre = torch.stack([x, y], -1).reshape(-1, 2)
        xyzr = xyxy_to_xyzr(torch.cat([centre - 8, centre + 8], 1)).expand(len(images), -1, -1)
        return State(torch.zeros(*xyzr.shape[:2], 3), xyzr), (images,)

def frame(*squares):
    "An image (3,S,S) with squares (x, y, colour); later ones hide earlier ones"
    image = torch.zeros(3, SIDE, SIDE)
    for x,y,c in squares:
        image[:, max(0, y-8):max(0, y+8), max(0, x-8):max(0, x+8)] = torch.tensor(c, dtype=torch.float)[:, None, None]
    return image

RED,BLUE,GREEN = (1, 0, 0),(0, 0, 1),(0, 1, 0)
def crossing(t): return frame((12 + 4*t, 40, RED), (84 - 4*t, 44, BLUE))
def centres(dets):
    "Number of an object -> its centre"
    mid = (dets['boxes'][:, :2] + dets['boxes'][:, 2:])/2
    return {i: m.tolist() for i,m in zip(dets['ids'].tolist(), mid) if i >= 0}

def test_crossing_keeps_identities():
    follow = Follower(Toy())
    seen = [centres(follow(crossing(t)[None])[0]) for t in range(19)]
    assert sorted(seen[0]) == [0, 1] == sorted(seen[-1])
    red = 0 if seen[0][0][0] < 48 else 1
    assert seen[-1][red][0] > 70 and seen[-1][1-red][0] < 26
    assert follow.slots[0].count == 2

def test_new_object_is_found_beside_held_ones():
    follow = Follower(Toy())
    for _ in range(3): follow(frame((20, 20, RED))[None])
    found = centres(follow(frame((20, 20, RED), (70, 70, GREEN))[None])[0])
    assert sorted(found) == [0, 1] and found[1][0] > 60

def test_naive_start_never_finds_what_appears():
    "All queries from the last fixed point: those with a colour keep it"
    toy = Toy()
    state,feats = toy.start(frame((20, 20, RED))[None])
    for _ in range(3): state = toy.step(state, feats)
    everywhere = blend(torch.ones(1, 36, dtype=torch.bool), state, state)
    _,feats = toy.start(frame((20, 20, GREEN))[None])
    held = toy.step(everywhere, feats)
    assert (toy.step.read(held).logits[state.content.any(-1)] < 0).all()
    assert len(centres(Follower(toy)(frame((20, 20, GREEN))[None])[0])) == 1

def test_hidden_object_is_waited_for_and_given_up():
    follow = Follower(Toy(), hold=Hold(patience=4))
    for _ in range(2): follow(frame((40, 40, RED))[None])
    assert centres(follow(frame()[None])[0]) == {}
    assert sorted(centres(follow(frame((40, 40, RED))[None])[0])) == [0]
    for _ in range(6): follow(frame()[None])
    assert not follow.slots[0].held.any()
    assert sorted(centres(follow(frame((40, 40, RED))[None])[0])) == [1]

def test_batch_equals_single():
    "Two films as rows of a batch, and one at a time"
    films = [[crossing(t) for t in range(8)], [frame((10 + 5*t, 70, GREEN)) for t in range(8)]]
    both = Follower(Toy())
    together = [both(torch.stack(o)) for o in zip(*films)]
    for row,film in enumerate(films):
        follow = Follower(Toy())
        for t,image in enumerate(film):
            one, = follow(image[None])
            for k,v in one.items(): assert torch.equal(v, together[t][row][k]), (t, k)

def test_batch_equals_single_in_a_detector():
    torch.manual_seed(0)
    model = create_detector('deqdet_tiny', n_classes=3).eval()
    images = torch.rand(4, 2, 3, 64, 64) # frames, films
    hold = Hold(take=.011, keep=.9)
    both = Follower(model, hold=hold)
    together = [both(o) for o in images]
    for row in range(2):
        follow = Follower(model, hold=hold)
        for t in range(4):
            one, = follow(images[t, row:row+1])
            assert torch.equal(one['ids'], together[t][row]['ids'])
            assert torch.allclose(one['boxes'], together[t][row]['boxes'], atol=1e-2)

def slots_of(boxes, ids, labels):
    boxes = torch.tensor(boxes, dtype=torch.float)
    state = State(torch.arange(len(boxes))[:, None].float(), xyxy_to_xyzr(boxes))
    return Slots.empty(state)._replace(ids=torch.tensor(ids), labels=torch.tensor(labels), count=max(ids)+1)

A,B = [10, 10, 30, 30],[60, 60, 80, 80]
def test_held_wins_over_fresh_with_a_better_score():
    slots = slots_of([A, B], [0, -1], [0, -1])
    look = Look(torch.tensor([.35, .9]), torch.tensor([0, 0]), torch.tensor([A, A], dtype=torch.float))
    seen,double = single(look, slots, slots.state.boxes, Hold())
    assert seen.tolist() == [True, False] and double.tolist() == [False, True]

def test_of_two_held_on_one_object_the_nearer_wins():
    slots = slots_of([A, B], [0, 1], [0, 0])
    look = Look(torch.tensor([.5, .9]), torch.tensor([0, 0]), torch.tensor([A, A], dtype=torch.float))
    after,_ = advance(slots, slots.state, look, (96, 96), Hold())
    assert after.age.tolist() == [0, 1] and after.ids.tolist() == [0, 1]
    assert torch.allclose(after.state.boxes[1], torch.tensor(B, dtype=torch.float), atol=1e-3)

def test_classes_do_not_rival():
    slots = slots_of([A, B], [0, -1], [0, -1])
    look = Look(torch.tensor([.9, .9]), torch.tensor([0, 1]), torch.tensor([A, A], dtype=torch.float))
    after,_ = advance(slots, slots.state, look, (96, 96), Hold())
    assert after.ids.tolist() == [0, 1]

def test_lost_object_is_regained_by_a_fresh_query():
    slots = slots_of([A, B], [0, -1], [0, -1])
    look = Look(torch.tensor([.05, .9]), torch.tensor([0, 0]), torch.tensor([B, A], dtype=torch.float))
    state = State(torch.tensor([[7.], [8.]]), xyxy_to_xyzr(look.boxes))
    after,source = advance(slots, state, look, (96, 96), Hold())
    assert after.ids.tolist() == [0, -1] and source.tolist() == [1, 1]
    assert after.state.content[0].item() == 8 and after.age[0] == 0

def test_object_that_leaves_is_given_up():
    slots = slots_of([[-30, 10, 10, 30], B], [0, 1], [0, 0])
    look = Look(torch.tensor([.01, .9]), torch.tensor([0, 0]), slots.state.boxes)
    after,_ = advance(slots, slots.state, look, (96, 96), Hold())
    assert after.ids.tolist() == [-1, 1]

def test_thresholds_of_each_class():
    hold = Hold(take=torch.tensor([.2, .8]))
    look = Look(torch.tensor([.5, .5]), torch.tensor([0, 1]), torch.tensor([A, B], dtype=torch.float))
    slots = Slots.empty(State(torch.zeros(2, 1), xyxy_to_xyzr(look.boxes)))
    after,_ = advance(slots, slots.state, look, (96, 96), hold)
    assert after.ids.tolist() == [0, -1]

def test_a_stack_has_no_warm_start():
    with pytest.raises(CommandError, match='needs an equilibrium'): Follower(create_detector('adamixer_tiny', n_classes=2))


@pytest.mark.parametrize('name', ['deq_sparse_rcnn_tiny', 'deq_deformable_detr_tiny'])
def test_states_of_other_families_are_refused(name):
    "Corners were read as log-scale positions, and films were empty"
    follow = Follower(create_detector(name, n_classes=2))
    with pytest.raises(CommandError, match="AdaMixer's states"): follow(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))

def test_a_query_that_went_astray_does_not_hide_doubles():
    slots = slots_of([A, B, A], [-1, -1, -1], [-1, -1, -1])
    far = [0., 0, 1e20, 1e20]
    look = Look(torch.tensor([.9, .8, .1]), torch.tensor([1, 1, 0]), torch.tensor([A, A, far], dtype=torch.float))
    assert single(look, slots, slots.state.boxes, Hold())[1].tolist() == [False, True, False]

def test_a_warm_start_takes_steps():
    "Without one, nothing would look at the frame; it was taken for the default"
    with pytest.raises(CommandError, match='steps 0'): Follower(create_detector('deqdet_tiny', n_classes=2), steps=0)

def test_pairs_are_those_of_decode_and_only_objects_have_numbers():
    torch.manual_seed(0)
    boxes = torch.rand(30, 4).sort(-1).values*96
    each = torch.rand(30, 7)
    look = Look(*each.max(-1), boxes, each)
    ids = torch.full((30,), -1)
    none = best_pairs(look, ids, torch.arange(30))
    want = decode(SimpleNamespace(logits=each.logit()[None], boxes=boxes[None]))
    assert torch.equal(none['labels'], want.labels[0]) and torch.equal(none['boxes'], want.boxes[0])
    assert torch.allclose(none['scores'], want.scores[0]) and (none['ids']==-1).all()
    worst = look.scores.argmin()
    ids[worst] = 5
    found = best_pairs(look, ids, torch.arange(30))
    assert (found['ids']==5).sum()==1 and found['labels'][found['ids']==5]==look.labels[worst]

def test_seen_object_is_among_the_pairs_of_a_crowd():
    torch.manual_seed(1)
    each = .5 + .5*torch.rand(200, 3)
    each[7] = torch.tensor([.1, .2, .15])
    look = Look(*each.max(-1), torch.rand(200, 4), each)
    ids = torch.full((200,), -1)
    ids[7] = 0
    found = best_pairs(look, ids, torch.arange(200))
    assert len(found['ids'])==200 and (found['ids']==0).sum()==1 and found['scores'][found['ids']==0]==.2

def test_neighbours_are_returned_and_copies_are_not():
    "Boxes of a class that overlap by .7 and by .9 with a held one"
    class Still(Follower):
        def __init__(self, slots, hold): self.slots,self.hold = [slots],hold
    boxes = torch.tensor([[0, 0, 100, 100], [0, 0, 100, 70], [0, 0, 100, 90]], dtype=torch.float)
    slots = slots_of(boxes.tolist(), [0, -1, -1], [0, -1, -1])
    each = torch.tensor([[.9, .1], [.8, .1], [.85, .1]])
    look = Look(*each.max(-1), boxes, each)
    state = slots.state
    def shown(hide):
        found = Still(slots, Hold(hide=hide)).answer(0, state, look, (96, 96))
        assert found['ids'].tolist().count(0)==1
        return sorted(found['scores'][found['labels']==0].tolist(), reverse=True)
    assert shown(.95)==pytest.approx([.9, .85, .8])
    assert shown(.8)==pytest.approx([.9, .8])
    assert shown(.6)==pytest.approx([.9])
