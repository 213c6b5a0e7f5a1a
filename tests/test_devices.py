"The device that is chosen, with backends that are not there: what PyTorch reports is patched"
import warnings
from pathlib import Path
import pytest, torch
import deqdet
from deqdet.ops.devices import accelerator, on_device, pick_device, synchronize

def report(monkeypatch, device):
    "PyTorch reports `device` as the accelerator; None: there is none"
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: device is not None)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda *args: torch.device(device or 'cuda'))

def nonzero(device): return torch.ones(3, device=device).nonzero()   # an operator that `meta` lacks

@pytest.mark.parametrize('device', ['cuda', 'mps', 'xpu'])
def test_the_accelerator_is_what_pytorch_reports(monkeypatch, device):
    report(monkeypatch, device)
    assert accelerator() == torch.device(device)

@pytest.mark.parametrize('rank,want', [('1', 'cuda:1'), ('2', 'cuda'), (None, 'cuda')])
def test_each_of_several_processes_takes_its_own_device(monkeypatch, rank, want):
    "All of them opened a context on the first one"
    report(monkeypatch, 'cuda')
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 2)
    if rank: monkeypatch.setenv('LOCAL_RANK', rank)
    else: monkeypatch.delenv('LOCAL_RANK', raising=False)
    assert accelerator()==torch.device(want)

def test_an_accelerator_that_pytorch_was_built_for_but_that_is_not_there_is_none(monkeypatch):
    report(monkeypatch, None)   # `current_accelerator` of torch 2.6 names what it was built for
    assert accelerator() is None and pick_device() == torch.device('cpu')

@pytest.mark.parametrize('device', ['meta', 'meta:0'])
def test_without_a_name_the_accelerator_is_taken(monkeypatch, device):
    report(monkeypatch, device)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert pick_device() == torch.device(device)
        assert pick_device('cpu') == pick_device(torch.device('cpu')) == torch.device('cpu')   # a name wins

def test_an_accelerator_that_does_not_work_costs_one_line(monkeypatch):
    report(monkeypatch, 'hpu')
    with pytest.warns(UserWarning, match=r'^hpu does not work \(.*\); using the CPU$') as notes:
        assert pick_device() == torch.device('cpu')
    assert len(notes) == 1 and '\n' not in str(notes[0].message)

@pytest.mark.parametrize('name', ['gpu', 'hpu', torch.device('hpu'), 'cpu:x'])
def test_a_named_device_that_does_not_work_is_an_error_and_never_exchanged(monkeypatch, name):
    report(monkeypatch, 'meta')
    with pytest.raises(ValueError, match=f'^device {name}: .') as e: pick_device(name)
    assert '\n' not in str(e.value)

def test_a_missing_operator_moves_the_work_to_the_cpu_with_one_line():
    with pytest.warns(UserWarning, match=r'^meta lacks an operator, using the CPU: .*nonzero') as notes:
        assert on_device(nonzero, 'meta').tolist() == [[0], [1], [2]]
    assert len(notes) == 1 and '\n' not in str(notes[0].message)

def test_on_mps_the_line_names_the_variable_that_moves_single_operators():
    def work(device):
        if device.type == 'mps': raise NotImplementedError("The operator 'aten::x' is not implemented. More.\nAnd more.")
        return device
    with pytest.warns(UserWarning, match='PYTORCH_ENABLE_MPS_FALLBACK=1') as notes:
        assert on_device(work, 'mps') == torch.device('cpu')
    assert str(notes[0].message).endswith("The operator 'aten::x' is not implemented")

@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_what_runs_is_done_once_on_the_device(device):
    seen = []
    assert on_device(lambda d: seen.append(d) or torch.ones(2, device=d), device).device == torch.device(device)
    assert seen == [torch.device(device)]

@pytest.mark.parametrize('device,error', [('cpu', NotImplementedError), ('meta', ValueError), ('meta', RuntimeError)])
def test_other_errors_pass_through(device, error):
    def work(device): raise error('mine')
    with pytest.raises(error, match='mine'): on_device(work, device)

def test_waiting_asks_the_accelerator_and_never_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, 'synchronize', asked.append)
    for device in ('cpu', torch.device('cpu'), 'cuda:1', torch.device('mps')): synchronize(device)
    assert asked == ['cuda:1', torch.device('mps')]

@pytest.mark.parametrize('module', ['backbone', 'boxes', 'mixing', 'ops/linear', 'ops/devices'])
def test_modules_below_move_nothing_to_a_named_accelerator(module):
    "No `.cuda()`, no 'cuda' as a device: tensors follow their inputs (documentation may name it)"
    source = (Path(deqdet.__file__).parent/f'{module}.py').read_text()
    code = '\n'.join(line.split(' # ')[0] for line in source.splitlines())
    assert '.cuda(' not in code and 'torch.cuda' not in code and "'cuda'" not in code and "'cuda:" not in code
