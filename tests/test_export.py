"The command that exports: its faults; what it writes is in test_using_exported.py"
import pytest, torch
from deqdet import export
from deqdet.cli import deqdet_export
from deqdet.export import load_exported
from deqdet.ops.errors import CommandError
from deqdet.zoo import create_detector


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_detector('deqdet_tiny', vocab=['a', 'b']).eval()


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

def test_three_parts_need_an_equilibrium(tmp_path):
    from deqdet.parts import _check_parts
    from deqdet.zoo import create_detector
    if torch.__version__ < '2.7': pytest.skip('ONNX needs torch 2.7')
    with pytest.raises(TypeError, match='three parts need'): _check_parts(create_detector('adamixer_tiny', n_classes=4))


@pytest.mark.parametrize('name', ['m.onnx', 'M.ONNX'])
def test_the_suffix_in_any_case_names_the_format(model, tmp_path, monkeypatch, name):
    monkeypatch.setattr(export, 'record', lambda *_: None)
    monkeypatch.setattr(export, '_save_onnx', lambda program, path, about: path.write_bytes(b'onnx'))
    assert model.export(tmp_path/name).read_bytes() == b'onnx'
    with pytest.raises(CommandError, match='ONNXRuntime'): load_exported(tmp_path/name)
