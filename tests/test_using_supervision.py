"The real package supervision: its annotators, its tracker and its slicer work with our detections"
import warnings
import numpy as np, pytest, torch
from deqdet.using.found import Found

sv = pytest.importorskip('supervision', reason='the package supervision is not installed (the extra "supervision")')
VOCAB = ['cat', 'dog']


def found(boxes, hw=(120, 160)):
    n = len(boxes)
    dets = dict(boxes=torch.tensor(boxes, dtype=torch.float).reshape(-1, 4), scores=torch.full((n,), .9), labels=torch.arange(n)%2)
    return Found(np.zeros((*hw, 3), np.uint8), hw, dets, vocab=VOCAB)


def test_annotators_draw():
    image = np.zeros((120, 160, 3), np.uint8)
    o = found([[10, 20, 60, 80], [70, 30, 140, 100]])
    drawn = sv.LabelAnnotator().annotate(sv.BoxAnnotator().annotate(image.copy(), o.to_supervision()), o.to_supervision())
    assert drawn.shape == image.shape and drawn[20, 10:60].any() and not image.any()
    assert not sv.BoxAnnotator().annotate(image.copy(), found([]).to_supervision()).any()


def test_a_tracker_keeps_identities():
    "Two boxes that move; each keeps its number"
    trackers = pytest.importorskip('trackers', reason='the package trackers is not installed')
    tracker = trackers.ByteTrackTracker()
    ids = [tracker.update(found([[10 + 2*t, 20, 50 + 2*t, 80], [90, 30 + t, 150, 90 + t]]).to_supervision()).tracker_id.tolist() for t in range(6)]
    assert len(set(ids[-1])) == 2 and min(ids[-1]) >= 0 and all(o == ids[-1] for o in ids[2:])


def test_the_slicer_puts_parts_together():
    "A bright square in a large image, found in slices by a function that answers with `Found`"
    image = np.zeros((300, 400, 3), np.uint8)
    image[100:140, 170:210] = 255
    def look(part):
        ys, xs = np.nonzero(part[..., 0])
        boxes = [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]] if len(xs) else []
        return found(boxes, part.shape[:2]).to_supervision()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dets = sv.InferenceSlicer(look, slice_wh=(160, 160), overlap_wh=(60, 60))(image)
    assert [170, 100, 210, 140] in dets.xyxy.astype(int).tolist()
    assert set(dets.data['class_name']) == {'cat'}
