"What a GPU asks of the inference path, and benchmarks/gpu.py at toy sizes"
import json, sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from deqdet.loss import decode
from deqdet.zoo import create_detector

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'))
import gpu


class NoSync(TorchDispatchMode):
    "Refuses operators for which the host waits, but those allowed"
    def __init__(self, *allowed):
        super().__init__()
        self.refused = {'_local_scalar_dense', 'nonzero', 'masked_select', 'equal'} - {*allowed}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix('aten::')
        assert name not in self.refused, name
        return func(*args, **(kwargs or {}))


NAMES = {'deqdet_tiny': [], 'adamixer_tiny': [], 'deformable_detr_tiny': [],
         'sparse_rcnn_tiny': ['nonzero']} # RoIAlign reads which boxes belong to a level

@pytest.mark.parametrize('name', NAMES)
def test_an_image_needs_no_number_from_the_host_and_gives_none(name, monkeypatch):
    "A CUDA graph of the whole solve can then be captured: such copies end a capture"
    model = create_detector(name).eval()
    images, sizes = torch.rand(2, 3, 64, 96), torch.tensor([[64, 96], [60, 90]])
    def refuse(*args, **kwargs): raise AssertionError(f'a tensor of numbers of the host: {args[-1]}')
    monkeypatch.setattr(torch.Tensor, 'new_tensor', refuse)
    for k in ('tensor', 'as_tensor', 'from_numpy'): monkeypatch.setattr(torch, k, refuse)
    with torch.no_grad(), NoSync(*NAMES[name]): found = decode(model(images, sizes)[-1])
    assert found.boxes.shape==(2, 100, 4)


def test_the_guard_sees_a_tolerance():
    model = create_detector('deqdet_tiny').eval()
    with torch.no_grad(), NoSync(), pytest.raises(AssertionError, match='_local_scalar_dense'):
        model(torch.rand(1, 3, 64, 96), torch.tensor([[64, 96]]), tol=.1)


def test_operations_count_products_and_skip_views():
    x = torch.ones(4, 8)
    seen = gpu.operations(lambda: (x @ x.T.contiguous()).view(2, 8).relu_())
    flops, moved = (sum(o) for o in zip(*seen))
    assert flops==2*4*8*4
    assert moved==4*(32 + 32) + 4*(32 + 32 + 16) + 4*(16 + 16) # a copy, a product, relu in place
    assert gpu.roofline(seen, 1e3, 1e12)['roofline_ms'] >= 1e3*flops/1e3


def test_the_script_at_toy_sizes(tmp_path, monkeypatch, capsys):
    "All parts but the training on a set, on a CPU; what stands is not measured again"
    out = tmp_path/'gpu.json'
    argv = ['gpu.py', '--toy', '--device', 'cpu', '--parts', 'step,solve,image,train', '--out', str(out)]
    monkeypatch.setattr(sys, 'argv', [*argv, '--backend='])
    gpu.main()
    found = json.loads(out.read_text())
    rows = found['result']
    assert list(rows)==['ceilings', 'step', 'solve', 'image, 1', 'train, 1']
    assert set(rows['solve']['ways'])=={'plain', 'plain, bf16', 'ours', 'ours, bf16'}
    assert rows['step']['apart'] < .01 and rows['solve']['logits_apart']['ours'] < 1e-3
    assert rows['image, 1']['scores_apart_on_another_batch']['plain'] < 1e-4
    assert any('graphs' in o for o in found['left_out'])
    monkeypatch.setattr(gpu, 'parts', lambda o: dict.fromkeys(rows)) # calling one would fail
    gpu.main()


def test_a_graph_that_fails_is_told_and_the_others_are_measured(monkeypatch):
    "As on a device with graphs: their place is taken by the function itself"
    o = Namespace(device=SimpleNamespace(type='cuda'), rounds=1)
    monkeypatch.setattr(gpu, 'row', lambda f, device: dict(peak_mb=1.))
    refused = None, dict(not_captured='operation not permitted')
    monkeypatch.setattr(gpu, 'captured', lambda f, device: (f, dict(peak_mb=2.)) if f() else refused)
    ways = {'plain': lambda: 1, 'ours': lambda: 1, 'ours, bf16': lambda: 0}
    rows, calls = gpu.measured(o, ways)
    assert set(calls)=={*ways, 'ours, graph'} and rows['ours, graph']['ms'] >= 0
    assert rows['ours, bf16, graph']==refused[1]


def test_the_fine_tuning_takes_the_options_of_the_command(monkeypatch):
    from deqdet import runs
    o = Namespace(device=torch.device('cpu'), finetuned='deqdet_lite', size='640', amp='bf16', workers=3, toy=False, minutes=4., data='sets/x')
    seen = dict(best={}, epochs=2, pictures_seen=60, seconds=4., curve=[], n_train=30, n_valid=5)
    def train(options, folder, begun):
        folder.mkdir()
        (folder/'metrics.json').write_text(json.dumps(seen))
        o.given = dict(options)
    monkeypatch.setattr(runs, 'train', train)
    found = gpu.finetune(o)
    wanted = dict(model='deqdet_lite', size='640', device='cpu', amp='bf16', workers=3, minutes=4., data='sets/x')
    assert o.given==wanted and found['images_a_second']==15.
    assert found['options']['data']=='x' # no path of a machine
