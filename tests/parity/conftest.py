"`pytest tests/parity --reference DIR`: compare with the pairs NAME.json + NAME.safetensors in DIR too"
from pairs import load_pair, reference_pairs


def pytest_addoption(parser):
    parser.addoption('--reference', action='append', default=[], help='a folder with more reference pairs')


def pytest_generate_tests(metafunc):
    "A test that asks for `deqdet_pair`, `noise_pair`... gets each of them"
    kinds = dict(deqdet_pair=('deqdet_', lambda n: not n.endswith('_loss')), deqdet_loss_pair=('deqdet_', lambda n: n.endswith('_loss')),
                 noise_pair=('noise', lambda n: True), adamixer_pair=('adamixer_', lambda n: True))
    for arg, (prefix, accept) in kinds.items():
        if arg in metafunc.fixturenames:
            paths = reference_pairs(metafunc.config, prefix, accept)
            metafunc.parametrize(arg, [load_pair(p) for p in paths], ids=[f'{p.parent.name}-{p.stem}' for p in paths])
