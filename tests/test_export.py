"Files that detect without the package: the command, its faults, and a trained-size model in onnxruntime"
import json
import pytest, torch
from deqdet.cli import deqdet_export
from deqdet.export import Fixed
from deqdet.zoo import create_detector


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_detector('deqdet_tiny', vocab=['a', 'b']).eval()


def agree(got, expected):
    "Boxes within a thousandth of a pixel, scores within 1e-5, the same classes"
    for a, b, within in zip(got, expected, (1e-3, 1e-5, 0)): torch.testing.assert_close(a, b, atol=within, rtol=0)


def pictures(b, h, w): return torch.randint(0, 256, (b, 3, h, w), dtype=torch.uint8), torch.tensor([[h - 7, w]]*b)


def test_command_writes_a_program_for_other_sizes(model, tmp_path, capsys):
    model.save_pretrained(tmp_path/'m')
    deqdet_export(str(tmp_path/'m'), str(tmp_path/'m.pt2'), steps=1)
    assert 'm.pt2' in capsys.readouterr().out
    extra = {'about.json': ''}
    run = torch.export.load(tmp_path/'m.pt2', extra_files=extra).module()
    assert json.loads(json.loads(extra['about.json'])['classes']) == ['a', 'b']
    for shape in (1, 64, 160), (5, 96, 64), (2, 128, 224):
        x = pictures(*shape)
        agree(run(*x), Fixed(model, 1)(*x))


@pytest.mark.skipif(torch.__version__ < '2.7', reason="torch 2.6's translator to ONNX fails on batch norms: microsoft/onnxscript#2651")
def test_onnx_equals_eager_on_other_sizes(model, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    run = ort.InferenceSession(str(model.export(tmp_path/'m.onnx', steps=0)), providers=['CPUExecutionProvider'])
    assert json.loads(run.get_modelmeta().custom_metadata_map['classes']) == ['a', 'b']
    for shape in (1, 64, 160), (4, 96, 64), (2, 128, 224):
        x = pictures(*shape)
        got = run.run(None, dict(images=x[0].numpy(), sizes=x[1].numpy()))
        agree([torch.from_numpy(o) for o in got[:2]], Fixed(model, 0)(*x))


@pytest.mark.skipif(torch.__version__ >= '2.7', reason='torch writes ONNX')
def test_old_torch_writes_no_onnx(model, tmp_path):
    with pytest.raises(ImportError, match='ONNX needs torch 2.7'): model.export(tmp_path/'m.onnx')


@pytest.mark.parametrize('kw,said', [
    (dict(model='nowhere', out='x.pt2'), 'nowhere'), (dict(out='x.pt2', steps=-1), '--steps -1'),
    (dict(out='M', steps=0), 'a folder')])
def test_faults_are_one_line(model, tmp_path, monkeypatch, capsys, kw, said):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained('M')
    with pytest.raises(SystemExit) as e: deqdet_export(**dict(model='M') | kw)
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and len(err.strip().splitlines()) == 1, err
