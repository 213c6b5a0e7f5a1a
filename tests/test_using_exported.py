"Exported files, one of each format: without the package, and used as detectors are; both say what the detector says"
import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
import numpy as np, pytest, torch
from PIL import Image
from deqdet.cli import deqdet_export
from deqdet.export import Exported, Fixed, load_exported, record, to_int8
from deqdet.model import Feed
from deqdet.ops.errors import CommandError
from deqdet.predict import predict
from deqdet.zoo import create_detector, published

SIZES = [(64, 96), (33, 65), (96, 96), (60, 200), (200, 60), (97, 129), (20, 50), (480, 640), (7, 7), (127, 63)]
pytestmark = pytest.mark.usefixtures('read_once')
THIN = [(31, 200), (200, 31), (1, 50)] # fed with a side below 33 pixels: the file gets more padding than the detector


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = create_detector('deqdet_tiny', vocab=['a', 'b']).eval()
    model.feed, model.thresholds = Feed(96, 128), [.1, 0.]
    return model


STEPS = {'.pt2': 1, '.onnx': 0}


@pytest.fixture(scope='module', params=STEPS)
def file(request, model, tmp_path_factory):
    "A torch program that the command wrote, and an ONNX file by `export`"
    folder = tmp_path_factory.mktemp('exported')
    if request.param == '.pt2':
        model.save_pretrained(folder/'m')
        with redirect_stdout(StringIO()) as out: deqdet_export(str(folder/'m'), str(folder/'m.pt2'), steps=STEPS['.pt2'])
        assert 'm.pt2' in out.getvalue()
        return folder/'m.pt2'
    if torch.__version__ < '2.7': pytest.skip("torch 2.6's translator to ONNX fails on batch norms: microsoft/onnxscript#2651")
    for o in 'onnxruntime', 'onnxscript': pytest.importorskip(o, reason=f'{o} is not installed')
    return model.export(folder/'m.onnx', steps=STEPS['.onnx'])


@pytest.fixture(scope='module')
def exported(file): return load_exported(file)


def noise(h, w): return np.random.default_rng((h, w)).integers(0, 256, (h, w, 3), dtype=np.uint8)


def agree(a, b):
    torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(a.boxes.sort(0).values, b.boxes.sort(0).values, atol=2e-2, rtol=1e-3) # nearly equal scores may change places


def bare(file):
    "The file as a function of images and sizes, without the package, and what it says about itself"
    if file.suffix == '.pt2':
        extra = {'about.json': ''}
        run = torch.export.load(file, extra_files=extra).module()
        return run, json.loads(extra['about.json'])
    import onnxruntime as ort
    session = ort.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    def run(images, sizes):
        boxes, scores, _ = session.run(None, dict(images=images.numpy(), sizes=sizes.numpy()))
        return torch.from_numpy(boxes), torch.from_numpy(scores)
    return run, session.get_modelmeta().custom_metadata_map


def test_without_the_package_it_equals_eager_on_other_sizes(model, file):
    "Boxes within a thousandth of a pixel, scores within 1e-5, the same classes; images with padding"
    run, about = bare(file)
    assert json.loads(about['classes']) == ['a', 'b']
    for b, h, w in (1, 64, 160), (5, 96, 64), (2, 128, 224):
        x = torch.randint(0, 256, (b, 3, h, w), dtype=torch.uint8), torch.tensor([[h - 7, w]]*b)
        for got, expected, within in zip(run(*x), Fixed(model, STEPS[file.suffix])(*x), (1e-3, 1e-5, 0)):
            torch.testing.assert_close(got, expected, atol=within, rtol=0)


def test_parity_on_ten_odd_sizes(model, file, exported):
    steps = STEPS[file.suffix]
    assert (exported.vocab, exported.feed, exported.thresholds) == (['a', 'b'], Feed(96, 128), [.1, 0.])
    pictures = [noise(*hw) for hw in SIZES]
    for o in pictures: agree(exported.predict(o, min_score=0.), predict(model, o, min_score=0., steps=steps))
    for a, b in zip(predict(exported, pictures, min_score=0., bs=4), predict(model, pictures, min_score=0., bs=4, steps=steps)): agree(a, b)


def test_thin_images_are_padded_further(model, file, exported):
    for hw in THIN:
        a = exported.predict(noise(*hw), min_score=0.)
        b = predict(model, noise(*hw), min_score=0., steps=STEPS[file.suffix])
        torch.testing.assert_close(a.scores, b.scores, atol=.1, rtol=0)


def test_everything_a_detector_takes(model, file, tmp_path):
    exported = load_exported(file, size='64')
    assert exported.feed == Feed(64, 64)
    Image.fromarray(noise(50, 70)).save(tmp_path/'x.png')
    assert exported.predict(tmp_path/'x.png').hw == (50, 70)
    assert [o.hw for o in exported.predict(tmp_path)] == [(50, 70)]
    assert (exported.predict(tmp_path/'x.png').scores >= 0).all()
    few = exported.predict(noise(90, 140), tiles=(64, 8), nms=.5, max_dets=3, min_score=0.)
    assert set(few.names) <= {'a', 'b'}
    batch = torch.from_numpy(noise(64, 96)).permute(2, 0, 1)[None]
    bytes_, floats = exported.predict(batch, min_score=.2), exported.predict(batch/255, min_score=.2)
    torch.testing.assert_close(bytes_[0]['boxes'], floats[0]['boxes'])
    twice = exported.predict(batch, torch.tensor([[64, 96]]), orig=torch.tensor([[128, 192]]), min_score=.2)
    torch.testing.assert_close(twice[0]['boxes'], 2*bytes_[0]['boxes'])
    with pytest.raises(TypeError, match='steps'): exported.predict(noise(9, 9), steps=3)


def test_faults_in_one_line(model, tmp_path):
    with pytest.raises(CommandError, match='no such file'): load_exported(tmp_path/'nothing.onnx')
    for name in 'm.pt2', 'm.onnx':
        (tmp_path/name).write_bytes(b'no model')
        if name.endswith('onnx'): pytest.importorskip('onnxruntime')
        with pytest.raises(CommandError, match=f'{name}: no exported detector') as e: load_exported(tmp_path/name)
        assert '\n' not in str(e.value)
    with pytest.raises(CommandError, match='providers are for .onnx'): load_exported(tmp_path/'m.pt2', providers='CPUExecutionProvider')
    with pytest.raises(CommandError, match='TPU is not there; there are .*CPUExecutionProvider'): load_exported(tmp_path/'m.onnx', providers=['TPU'])


@pytest.mark.skipif(torch.__version__ < '2.7', reason='torch 2.6 cannot write the conditions on free sizes of this graph')
def test_a_body_that_pads_by_size():
    "EfficientNet's same padding is recorded as constants: seconds, and the detector's own results; files are tested above"
    torch.manual_seed(0)
    lite = create_detector('deqdet_lite', vocab=['a', 'b'], pretrained=False).eval()
    lite.feed = Feed(96, 128)
    exported = Exported(torch.no_grad()(record(lite, steps=0).module()), dict(classes='["a", "b"]', feed='{"short": 96, "long": 128}'))
    for hw in SIZES:
        if min(hw) > 32: agree(exported.predict(noise(*hw), min_score=0.), predict(lite, noise(*hw), min_score=0., steps=0))
    assert any(type(m).__name__ == 'Conv2dSame' for m in lite.modules()), 'the detector itself is left as it was'


@pytest.mark.skipif(torch.__version__ < '2.7', reason='not tried with torch 2.6')
def test_deformable_detr_and_an_image_of_one_cell(tmp_path):
    "Its coarsest level has a stride of 64, not 32"
    torch.manual_seed(0)
    model = create_detector('deformable_detr_tiny', vocab=['a', 'b']).eval()
    file = model.export(tmp_path/'m.pt2')
    batch = torch.from_numpy(noise(50, 60)).permute(2, 0, 1)[None]
    here = model.predict(torch.nn.functional.pad(batch, (0, 68, 0, 78)), torch.tensor([[50, 60]]))
    there = load_exported(file).predict(batch, torch.tensor([[50, 60]]))
    torch.testing.assert_close(here[0]['scores'], there[0]['scores'], atol=1e-4, rtol=0)


def test_two_stages_are_refused_in_one_line(tmp_path):
    model = replace(published('deformable_detr_tiny').hyper, two_stage=True, n_classes=2).build()
    with pytest.raises(ValueError, match='^two stages: .*$'): model.export(tmp_path/'m.pt2')


def test_int8_is_smaller_and_near(model, file, exported, tmp_path):
    "The weights of matmuls in eight bits: names are kept, scores change little; a torch program has no such form"
    if file.suffix == '.pt2':
        with pytest.raises(ValueError, match='int8: only ONNX'): model.export(tmp_path/'x.pt2', int8=True)
        return
    small = tmp_path/'int8.onnx'
    small.write_bytes(file.read_bytes())
    to_int8(small)
    assert small.stat().st_size < .8*file.stat().st_size
    eight = load_exported(small)
    assert (eight.vocab, eight.feed) == (['a', 'b'], Feed(96, 128))
    a, b = (m.predict(noise(64, 96), min_score=0.) for m in (eight, exported))
    assert 0 < (a.scores - b.scores).abs().max() < .02


def test_a_batch_takes_the_scores_that_a_detector_takes(model, file):
    "None, a number, or one for each class"
    exported = load_exported(file)
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 64, 96), dtype=np.uint8))
    scores = model.predict(x, steps=STEPS[file.suffix])[0]['scores'].unique()
    i = scores.diff().argmax()
    level = float(scores[i:i+2].mean()) # between two scores, far from both
    for bar in (None, 0., level, [level, 0.], torch.tensor([0., level])):
        pairs = zip(exported.predict(x, min_score=bar), model.predict(x, min_score=bar, steps=STEPS[file.suffix]), strict=True)
        assert all(len(a['labels']) == len(b['labels']) and torch.equal(a['labels'].bincount(), b['labels'].bincount()) for a, b in pairs)


def test_more_detections_than_a_file_gives_are_an_error(model, file):
    exported = load_exported(file)
    with pytest.raises(CommandError, match='max_dets 101: this file gives at most 100'): predict(exported, np.zeros((64, 64, 3), np.uint8), max_dets=101)
    assert len(predict(exported, np.zeros((64, 64, 3), np.uint8), max_dets=100, min_score=0.).boxes) == 24 # 12 queries, 2 classes
