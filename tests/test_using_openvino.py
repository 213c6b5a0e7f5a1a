"OpenVINO runs the exported file, and says what onnxruntime says"
import numpy as np, pytest, torch
from deqdet.export import Exported, load_exported
from deqdet.model import Feed
from deqdet.zoo import create_detector

openvino = pytest.importorskip('openvino', reason='openvino is not installed (the extra "openvino")')
pytest.importorskip('onnxscript', reason='onnxscript is not installed')


def test_the_same_file_by_openvino(tmp_path):
    torch.manual_seed(0)
    model = create_detector('deqdet_tiny', vocab=['a', 'b']).eval()
    model.feed = Feed(96, 128)
    file = model.export(tmp_path/'m.onnx', steps=0)
    expected = load_exported(file)
    compiled = openvino.Core().compile_model(str(file), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    def run(images, sizes):
        found = compiled(dict(images=images.contiguous().numpy(), sizes=sizes.numpy()))
        return [torch.from_numpy(found[o].copy()) for o in compiled.outputs]
    other = Exported(run, expected.about)
    for hw in (64, 96), (97, 129), (60, 200):
        image = np.random.default_rng(hw).integers(0, 256, (*hw, 3), dtype=np.uint8)
        a, b = (m.predict(image, min_score=0.) for m in (expected, other))
        torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(a.boxes.sort(0).values, b.boxes.sort(0).values, atol=.05, rtol=1e-3)
