"OpenVINO computes what onnxruntime computes from the same exported file, in a process of its own: beside torch it may crash"
import os, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import numpy as np, pytest
import deqdet.export # gives detectors `export`
from deqdet.predict import load_detector

ROOT = Path(__file__).resolve().parents[1]

if find_spec('openvino') is None: pytest.skip('openvino is not installed (the extra "openvino")', allow_module_level=True)
pytest.importorskip('onnxscript', reason='onnxscript is not installed')
onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')

RUN = '''
import sys, numpy as np, openvino
compiled = openvino.Core().compile_model(sys.argv[1], 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
given = np.load(sys.argv[2])
found = {}
for key in sorted({k.split('/')[0] for k in given}):
    answers = compiled({k: given[f'{key}/{k}'] for k in ('images', 'sizes')})
    for i,answer in enumerate(answers.values()): found[f'{key}/{i}'] = answer
np.savez(sys.argv[3], **found)
'''


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    model = load_detector(ROOT/'nbs/tutorials/shapes_detector', device='cpu')
    return model.export(tmp_path_factory.mktemp('openvino')/'m.onnx', steps=1)


def test_the_same_file_by_openvino(file, tmp_path):
    session = onnxruntime.InferenceSession(str(file))
    kinds = {i.name: i.type for i in session.get_inputs()}
    rng = np.random.default_rng(0)
    given = {}
    for i,(h, w) in enumerate([(64, 96), (96, 128), (160, 64)]):
        pixels = rng.integers(0, 256, (1, 3, h, w), dtype=np.uint8)
        given[f'{i}/images'] = pixels if 'uint8' in kinds['images'] else pixels.astype(np.float32)/255
        given[f'{i}/sizes'] = np.array([[h, w]])
    np.savez(tmp_path/'given.npz', **given)
    code = [sys.executable, '-c', RUN, str(file), str(tmp_path/'given.npz'), str(tmp_path/'found.npz')]
    subprocess.run(code, check=True, env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)})
    found = np.load(tmp_path/'found.npz')
    for i in range(3):
        want = session.run(None, {k: given[f'{i}/{k}'] for k in ('images', 'sizes')})
        scores = next(o for o in want if o.ndim==2 and o.dtype==np.float32)
        for j,answer in enumerate(want):
            got = found[f'{i}/{j}']
            assert got.shape==answer.shape
            if answer.dtype != np.float32: continue # labels of equal scores may change places
            np.testing.assert_allclose(np.sort(got, 1), np.sort(answer, 1), atol=.05 if answer.ndim==3 else 1e-4)
        assert scores.max() > 0
