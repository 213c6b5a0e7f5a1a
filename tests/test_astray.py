"Warm start: a query whose box runs away does not keep its object"
import pytest, torch
from deqdet.boxes import xyxy_to_xyzr
from deqdet.decoder import State
from deqdet.using.held import Hold, Look, Slots, advance, astray

BOXES = torch.tensor([[10., 10, 30, 30], [-10, 5, 22, 40], [0, 0, 96, 96]])
def state(boxes=BOXES): return State(torch.zeros(len(boxes), 4), xyxy_to_xyzr(boxes))

@pytest.mark.parametrize('box', [[-822., -9.5e7, -822, 9.5e7], [300, 10, 320, 30], [10, -150, 30, -130], [-200, -200, 300, 300], [float('nan')]*4])
def test_boxes_that_run_away(box):
    far = astray(state(torch.cat([BOXES, torch.tensor([box])])), (96, 96))
    assert far.tolist()==[False]*3 + [True]

def test_it_loses_its_object_and_takes_none():
    z = state()
    ids = torch.tensor([0, 1, -1])
    slots = Slots.empty(z)._replace(ids=ids, labels=torch.zeros(3, dtype=torch.long), count=2)
    gone = BOXES.clone()
    gone[1:] += 400.
    look = Look(torch.full((3,), .9), torch.zeros(3, dtype=torch.long), gone)
    after,_ = advance(slots, state(gone), look, (96, 96), Hold())
    assert after.ids.tolist()==[0, 1, -1] and after.age.tolist()==[0, 1, 0] and after.count==2
    torch.testing.assert_close(after.state.xyzr[1], z.xyzr[1]) # where it was expected
    still,_ = advance(slots, z, look._replace(boxes=BOXES), (96, 96), Hold())
    assert still.age.tolist()==[0, 0, 0] and still.count==3
