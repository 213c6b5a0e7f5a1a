"""OpenVINO on the file that `export` writes: with a fixed number of images it says what the detector says, at any size

OpenVINO's CPU plugin computes wrong boxes, or ends the process, where the number of images is left open (seen in 2026.4.1). It therefore runs in a
process of its own, and that case is an expected failure."""
import os, subprocess, sys
from importlib.metadata import version
import numpy as np, pytest, torch
from deqdet.export import Fixed
from deqdet.zoo import create_detector

for o in 'openvino', 'onnxruntime', 'onnxscript': pytest.importorskip(o, reason=f'the package {o} is not installed')
SIZES = [(64, 96), (96, 96), (160, 64), (128, 224)]
RUN = '''
import sys, numpy as np, openvino
file, folder, n = sys.argv[1:]
core = openvino.Core()
model = core.read_model(file)
model.reshape({'images': [int(n), 3, -1, -1], 'sizes': [int(n), 2]})
run = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
given = np.load(f'{folder}/given.npz')
found = {}
for k in sorted({o.split('/')[0] for o in given}):
    fed = {o: given[f'{k}/{o}'] for o in ('images', 'sizes')}
    for i, v in enumerate(run(fed).values()): found[f'{k}/{i}'] = v
np.savez(f'{folder}/found.npz', **found)
'''


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_detector('deqdet_tiny', vocab=['a', 'b']).eval()


@pytest.fixture(scope='module')
def file(model, tmp_path_factory): return model.export(tmp_path_factory.mktemp('openvino')/'m.onnx', steps=0)


def batches(n):
    "Images of several sizes, the first one with padding"
    rng = np.random.default_rng(0)
    given = {}
    for i, (h, w) in enumerate(SIZES):
        given[f'{i}/images'] = rng.integers(0, 256, (n, 3, h, w), dtype=np.uint8)
        given[f'{i}/sizes'] = np.array([[h - 20*(i == 0), w]]*n)
    return given


def by_openvino(file, folder, given, n):
    "Boxes, scores and classes of each batch; None where its process died"
    np.savez(folder/'given.npz', **given)
    env = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, '-c', RUN, str(file), str(folder), str(n)], env=env, capture_output=True, text=True)
    if done.returncode < 0: return None
    assert done.returncode == 0, done.stderr
    return np.load(folder/'found.npz')


@torch.no_grad()
def agrees(model, given, found):
    "Boxes within a hundredth of a pixel, scores within 1e-5"
    for k in sorted({o.split('/')[0] for o in given}):
        images, sizes = (torch.from_numpy(given[f'{k}/{o}']) for o in ('images', 'sizes'))
        for i, (mine, tol) in enumerate(zip(Fixed(model, 0)(images, sizes)[:2], (1e-2, 1e-5))):
            if not np.allclose(mine.numpy(), found[f'{k}/{i}'], rtol=0, atol=tol): return False
    return True


@pytest.mark.parametrize('n', [1, 2])
def test_a_fixed_number_of_images(model, file, tmp_path, n):
    given = batches(n)
    found = by_openvino(file, tmp_path, given, n)
    if found is None: pytest.xfail(f'OpenVINO {version("openvino")} ends the process')
    assert agrees(model, given, found)


def test_the_comparison_sees_a_pixel(model):
    "Wrong numbers are seen: boxes of another image, and boxes that are off by a pixel"
    given = batches(1)
    with torch.no_grad(): fine = {f'{k}/{i}': o.numpy() for k in range(len(SIZES)) for i, o in enumerate(Fixed(model, 0)(
        *(torch.from_numpy(given[f'{k}/{o}']) for o in ('images', 'sizes'))))}
    assert agrees(model, given, fine)
    assert not agrees(model, given, fine | {'1/0': fine['1/0'] + 1})
    assert not agrees(model, given, fine | {'2/1': fine['2/1'][:, ::-1]})


def test_any_number_of_images(model, file, tmp_path):
    "What we cannot rely on; passes where OpenVINO gets it right"
    given = batches(2)
    found = by_openvino(file, tmp_path, given, -1)
    if found is None or not agrees(model, given, found):
        pytest.xfail(f'OpenVINO {version("openvino")} with a free number of images: {"it ends the process" if found is None else "wrong boxes"}')
